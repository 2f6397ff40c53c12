"""Norm calls through the raw functions of a backend, forward and backward, and the comparison with float64."""

import torch
from numerics import GRADIENT, OUTPUT, assert_as_accurate

from transformer_fast.backends import get, memory
from transformer_fast.backends.specs import NormSpec

NAMES = ("y", "sum", "grad_x", "grad_residual", "grad_weight", "grad_bias")


def run(backend, tensors, rms, add, p, rng, dtype, parameter_dtype=None):
    """y, the sum and the gradients, by the raw methods of a backend. rng: the dropout state."""
    x, residual, weight, bias, grad_y, grad_sum = (None if t is None else t.to(dtype) for t in tensors)
    weight, bias = (None if t is None else t.to(parameter_dtype or dtype) for t in (weight, bias))
    if not add:
        residual = grad_sum = None
    rows, width = x.shape
    kept = add or p > 0
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def new(*shape, like=dtype):
        return memory.empty(shape, like, x.device)

    y, total = new(rows, width), new(rows, width) if kept else None
    mean, rstd = None if rms else new(rows, like=wide), new(rows, like=wide)
    backend.norm_forward(NormSpec(x, residual, weight, bias, rng, 1e-5, rms, p), y, total, mean, rstd)
    v = total if kept else x
    grad_v, grad_x = new(rows, width), new(rows, width) if p else None
    grad_weight = None if weight is None else new(width, like=wide)
    grad_bias = None if bias is None else new(width, like=wide)
    backend.norm_backward(
        NormSpec(v, None, weight, None, rng, 1e-5, rms, p), grad_y, grad_sum, mean, rstd,
        grad_v, grad_x, grad_weight, grad_bias,
    )  # fmt: skip
    parameters = [None if g is None else g.to(dtype) for g in (grad_weight, grad_bias)]
    return y, total, grad_x if p else grad_v, grad_v if add else None, *parameters


def check(
    backend, device, rows, width, dtype, *, rms=False, add=False, p=0.0, affine=(True, True), stride=None, offset=0.0,
    parameter_dtype=None,
):  # fmt: skip
    """Compare `backend` with float64. affine: with weight and bias. stride: elements between rows beyond the width.
    parameter_dtype: dtype of weight and bias, if not that of the rows."""

    def draw(*shape):
        return torch.randn(shape, device=device).to(dtype)

    storage = width + (stride or 0)
    x, residual, grad_y, grad_sum = (draw(rows, storage)[:, :width] for _ in range(4))
    x += offset
    weight = draw(width) if affine[0] else None
    bias = draw(width) if affine[1] and not rms else None
    rng = torch.randint(-(2**63), 2**63 - 1, (2,), device=device) if p else None
    tensors = (x, residual, weight, bias, grad_y, grad_sum)
    features = (rms, add, p, rng)
    ours = run(get(backend), tensors, *features, dtype, parameter_dtype)
    eager = run(get("eager"), tensors, *features, dtype, parameter_dtype)
    truth = run(get("eager"), tensors, *features, torch.float64)
    for name, a, t, e in zip(NAMES, ours, truth, eager):
        assert (a is None) == (t is None), name
        if a is not None:
            assert_as_accurate(a, t, e, OUTPUT if name in ("y", "sum") else GRADIENT, name)
