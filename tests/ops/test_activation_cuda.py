"""The CUDA bias + activation kernels against float64: on a GPU if there is one, else under the emulator."""

import contextlib

import activation_cases
import cuda_emulator
import pytest
import torch
from remembered_cases import check_repeats

import transformer_fast as tf
from transformer_fast.backends import remembered
from transformer_fast.ops.activation import ACTIVATIONS


@pytest.fixture(autouse=True)
def _on_the_device(device):
    with contextlib.nullcontext() if device == "cuda" else cuda_emulator.active():
        yield


@pytest.mark.quick
@pytest.mark.parametrize("dtype", activation_cases.DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_features(device, dtype, activation, gated):
    activation_cases.check("cuda", device, 9, 80, dtype, activation, gated=gated)


def test_drawn_shapes(device):
    activation_cases.check_drawn("cuda", device)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_at_the_ends(device, activation):
    activation_cases.check_ends("cuda", device, activation)


def test_rows_of_several_blocks(device):
    """Blocks walk over more rows than one pass takes, and over columns of two blocks."""
    activation_cases.check("cuda", device, 700, 264, torch.bfloat16, "silu", gated=True)
    activation_cases.check("cuda", device, 6, 2100, torch.bfloat16, "gelu", gated=True)


def test_same_bits_every_time(device):
    x, gate, grad = (torch.randn(300, 96, device=device) for _ in range(3))
    bias = torch.randn(96, device=device, requires_grad=True)
    leaves, found = (x.requires_grad_(), bias, gate.requires_grad_()), []
    for _ in range(2):
        with tf.backend("cuda"):
            found.append(torch.autograd.grad(tf.bias_activation(x, bias, "gelu", gate=gate), leaves, grad))
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_opcheck_and_autograd(device):
    activation_cases.check_opcheck_and_autograd("cuda", device)


@pytest.mark.quick
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["biased", "gated"])
def test_a_remembered_call_has_the_same_results(device, name, dtype, gradients):
    check_repeats(device, name, "cuda", dtype, gradients)
    assert remembered._calls
