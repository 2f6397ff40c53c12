"""The Triton bias + activation kernels against float64: on a GPU if there is one, else under the interpreter."""

import contextlib

import activation_cases
import pytest
import torch
import triton_interpreter
from remembered_cases import check_repeats

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
    activation_cases.check_opcheck_and_autograd("triton", device)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", ["biased", "gated"])
def test_a_remembered_call_has_the_same_results(device, name, gradients):
    """On a GPU. Under the interpreter no launch is repeated."""
    check_repeats(device, name, "triton", torch.bfloat16, gradients)
