"""The Triton bias + activation kernels against float64: on a GPU if there is one, else under the interpreter."""

import contextlib

import pytest
import torch
import triton_interpreter
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import GRADIENT, OUTPUT, assert_as_accurate

import transformer_fast as tf
from transformer_fast.backends import get, memory
from transformer_fast.backends.triton import BACKEND
from transformer_fast.ops.activation import ACTIVATIONS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("y", "grad_x", "grad_bias", "grad_gate")


@pytest.fixture(autouse=True)
def _on_the_device(device):
    with contextlib.nullcontext() if device == "cuda" else triton_interpreter.active():
        yield


def _run(backend, tensors, activation, dtype):
    x, bias, gate, grad = (None if t is None else t.to(dtype) for t in tensors)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    y, grad_x, grad_gate = (memory.empty(tuple(x.shape), dtype, x.device) for _ in range(3))
    grad_bias = None if bias is None else memory.empty((x.shape[1],), wide, x.device)
    if gate is None:
        grad_gate = None
    backend.bias_activation_forward(x, bias, gate, activation, y)
    backend.bias_activation_backward(grad, x, bias, gate, activation, grad_x, grad_bias, grad_gate)
    return y, grad_x, None if grad_bias is None else grad_bias.to(dtype), grad_gate


def _check(device, rows, width, dtype, activation, *, bias=True, gated=False, scale=2.0):
    # x and gate are the two halves of one wider tensor, as in gated units.
    halves = (torch.randn(rows, 2 * width, device=device) * scale).to(dtype)
    tensors = (
        halves[:, :width],
        torch.randn(width, device=device).to(dtype) if bias else None,
        halves[:, width:] if gated else None,
        torch.randn(rows, width, device=device).to(dtype),
    )
    ours = _run(BACKEND, tensors, activation, dtype)
    eager = _run(get("eager"), tensors, activation, dtype)
    truth = _run(get("eager"), tensors, activation, torch.float64)
    for name, a, t, e in zip(NAMES, ours, truth, eager):
        assert (a is None) == (t is None), name
        if a is not None:
            assert_as_accurate(a, t, e, OUTPUT if name == "y" else GRADIENT, name)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_features(device, dtype, activation, gated):
    _check(device, 9, 80, dtype, activation, gated=gated)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.data())
def _drawn(device, data):
    _check(
        device,
        data.draw(st.integers(1, 40), label="rows"),
        data.draw(st.integers(1, 600), label="width"),
        data.draw(st.sampled_from(DTYPES), label="dtype"),
        data.draw(st.sampled_from(ACTIVATIONS), label="activation"),
        bias=data.draw(st.booleans(), label="bias"),
        gated=data.draw(st.booleans(), label="gated"),
        scale=data.draw(st.sampled_from([0.01, 1.0, 30.0]), label="scale"),
    )


def test_drawn_shapes(device):
    _drawn(device)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_at_the_ends(device, activation):
    """Large inputs do not overflow, and NaN stays NaN."""
    x = torch.tensor([[-1e4, -90.0, -0.0, 0.0, 90.0, 1e4, float("nan")]], device=device)
    y = memory.empty(tuple(x.shape), torch.float32, x.device)
    grad = memory.empty(tuple(x.shape), torch.float32, x.device)
    BACKEND.bias_activation_forward(x, None, None, activation, y)
    wanted = get("eager")
    expected, slope = torch.empty_like(y), torch.empty_like(y)
    wanted.bias_activation_forward(x, None, None, activation, expected)
    torch.testing.assert_close(y, expected, equal_nan=True)
    BACKEND.bias_activation_backward(torch.ones_like(x), x, None, None, activation, grad, None, None)
    wanted.bias_activation_backward(torch.ones_like(x), x, None, None, activation, slope, None, None)
    torch.testing.assert_close(grad[:, :6], slope[:, :6])


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
