"""Calls of bias + activation through the raw functions of a backend, forward and backward, and the comparison with
float64."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import GRADIENT, OUTPUT, assert_as_accurate

import transformer_fast as tf
from transformer_fast.backends import get, memory
from transformer_fast.ops.activation import ACTIVATIONS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("y", "grad_x", "grad_bias", "grad_gate")


def run(backend, tensors, activation, dtype):
    x, bias, gate, grad = (None if t is None else t.to(dtype) for t in tensors)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    y, grad_x, grad_gate = (memory.empty(tuple(x.shape), dtype, x.device) for _ in range(3))
    grad_bias = None if bias is None else memory.empty((x.shape[1],), wide, x.device)
    if gate is None:
        grad_gate = None
    backend.bias_activation_forward(x, bias, gate, activation, y)
    backend.bias_activation_backward(grad, x, bias, gate, activation, grad_x, grad_bias, grad_gate)
    return y, grad_x, None if grad_bias is None else grad_bias.to(dtype), grad_gate


def check(backend, device, rows, width, dtype, activation, *, bias=True, gated=False, scale=2.0):
    # x and gate are the two halves of one wider tensor, as in gated units.
    halves = (torch.randn(rows, 2 * width, device=device) * scale).to(dtype)
    tensors = (
        halves[:, :width],
        torch.randn(width, device=device).to(dtype) if bias else None,
        halves[:, width:] if gated else None,
        torch.randn(rows, width, device=device).to(dtype),
    )
    ours = run(get(backend), tensors, activation, dtype)
    eager = run(get("eager"), tensors, activation, dtype)
    truth = run(get("eager"), tensors, activation, torch.float64)
    for name, a, t, e in zip(NAMES, ours, truth, eager):
        assert (a is None) == (t is None), name
        if a is not None:
            assert_as_accurate(a, t, e, OUTPUT if name == "y" else GRADIENT, name)


def check_drawn(backend, device) -> None:
    @settings(max_examples=20, deadline=None, derandomize=True)
    @given(data=st.data())
    def drawn(data):
        check(
            backend,
            device,
            data.draw(st.integers(1, 40), label="rows"),
            data.draw(st.integers(1, 600), label="width"),
            data.draw(st.sampled_from(DTYPES), label="dtype"),
            data.draw(st.sampled_from(ACTIVATIONS), label="activation"),
            bias=data.draw(st.booleans(), label="bias"),
            gated=data.draw(st.booleans(), label="gated"),
            scale=data.draw(st.sampled_from([0.01, 1.0, 30.0]), label="scale"),
        )

    drawn()


def check_ends(backend, device, activation) -> None:
    """Large inputs do not overflow, and NaN stays NaN."""
    x = torch.tensor([[-1e4, -90.0, -0.0, 0.0, 90.0, 1e4, float("nan")]], device=device)
    y = memory.empty(tuple(x.shape), torch.float32, x.device)
    grad = memory.empty(tuple(x.shape), torch.float32, x.device)
    ours, wanted = get(backend), get("eager")
    ours.bias_activation_forward(x, None, None, activation, y)
    expected, slope = torch.empty_like(y), torch.empty_like(y)
    wanted.bias_activation_forward(x, None, None, activation, expected)
    torch.testing.assert_close(y, expected, equal_nan=True)
    ours.bias_activation_backward(torch.ones_like(x), x, None, None, activation, grad, None, None)
    wanted.bias_activation_backward(torch.ones_like(x), x, None, None, activation, slope, None, None)
    torch.testing.assert_close(grad[:, :6], slope[:, :6])


def check_opcheck_and_autograd(backend, device) -> None:
    x = torch.randn(6, 40, device=device, requires_grad=True)
    bias = torch.randn(20, device=device, requires_grad=True)
    args = (x[:, :20], bias, x[:, 20:], "silu")
    with tf.backend(backend):
        torch.library.opcheck(torch.ops.transformer_fast.bias_activation.default, args)
        ours = torch.autograd.grad(tf.bias_activation(*args[:2], "silu", gate=args[2]).square().sum(), (x, bias))
    u = torch.nn.functional.silu(x[:, :20] + bias) * x[:, 20:]
    for a, b in zip(ours, torch.autograd.grad(u.square().sum(), (x, bias))):
        torch.testing.assert_close(a, b)
