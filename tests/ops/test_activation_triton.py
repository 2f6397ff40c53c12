"""The Triton bias + activation kernels against float64: on a GPU if there is one, else under the interpreter."""

import contextlib

import activation_cases
import pytest
import torch
import triton_interpreter

import transformer_fast as tf
from transformer_fast.ops.activation import ACTIVATIONS


@pytest.fixture(autouse=True)
def _on_the_device(device):
    with contextlib.nullcontext() if device == "cuda" else triton_interpreter.active():
        yield


@pytest.mark.quick
@pytest.mark.parametrize("dtype", activation_cases.DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_features(device, dtype, activation, gated):
    activation_cases.check("triton", device, 9, 80, dtype, activation, gated=gated)


def test_drawn_shapes(device):
    activation_cases.check_drawn("triton", device)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_at_the_ends(device, activation):
    activation_cases.check_ends("triton", device, activation)


def test_opcheck_and_autograd(device):
    x = torch.randn(6, 40, device=device, requires_grad=True)
    bias = torch.randn(20, device=device, requires_grad=True)
    args = (x[:, :20], bias, x[:, 20:], "silu")
    with tf.backend("triton"):
        torch.library.opcheck(torch.ops.transformer_fast.bias_activation.default, args)
        ours = torch.autograd.grad(tf.bias_activation(*args[:2], "silu", gate=args[2]).square().sum(), (x, bias))
    u = torch.nn.functional.silu(x[:, :20] + bias) * x[:, 20:]
    for a, b in zip(ours, torch.autograd.grad(u.square().sum(), (x, bias))):
        torch.testing.assert_close(a, b)
