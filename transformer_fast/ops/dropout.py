"""Counter-based dropout, which saves only a seed for the backward pass (see backends/philox.py)."""

import torch

from ..backends import memory, select
from ..backends.philox import keep_mask_2d, keep_scale, threshold
from . import _common


def _forward(x: torch.Tensor, rng: torch.Tensor, p: float) -> torch.Tensor:
    width = x.shape[-1]
    chosen = select(("dropout", x.device.type, x.dtype, width, ()))
    y = memory.empty_like(x)
    rows = (x, y) if x.dim() == 2 else (x.reshape(-1, width), y.view(-1, width))
    chosen.dropout_forward(rows[0], rng, p, rows[1])
    return y


def _fake(x, rng, p):
    return x.new_empty(x.shape)


def _setup(ctx, inputs, output):
    _, rng, ctx.p = inputs
    ctx.save_for_backward(rng)


def _backward(ctx, need, grad):
    (rng,) = ctx.saved_tensors
    return {"x": _op(grad.contiguous(), rng, ctx.p)}


_op = _common.define(
    "dropout", "(Tensor x, Tensor rng, float p) -> Tensor", _forward, _fake, setup_context=_setup, backward=_backward
)


def dropout(
    input: torch.Tensor, p: float = 0.5, training: bool = True, *, generator: torch.Generator | None = None
) -> torch.Tensor:
    """y = keep * x / (1 - p), keep ~ Bernoulli(1 - p). Counter-based: only the seed is saved for the backward pass.

    Signature of torch.nn.functional.dropout without inplace, plus generator.

    Args:
        input: (..., N), float16, bfloat16 or float32 (float64 in plain PyTorch).
        p: probability of dropping an element, in [0, 1], rounded to a multiple of 1/65536.
        training: if False, input is returned unchanged.
        generator: the torch.Generator from which the seed is drawn; default torch's own of the device.

    Returns:
        A tensor of input's shape and dtype.

    Raises:
        TypeError, ValueError: if an argument is invalid; the message names it, its value and what is expected.

    Source:
        Srivastava et al., "Dropout", JMLR 2014; Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.

    Examples:
        >>> import torch, transformer_fast
        >>> transformer_fast.dropout(torch.ones(4, 8), 0.5).shape
        torch.Size([4, 8])
    """
    _common.check_floating("input", input)
    _common.check_probability("p", p)
    if training and p == 1.0:  # the kernels do not handle p = 1
        return input * 0
    if not training or threshold(p) == 0 or input.numel() == 0:
        return input
    x = input if input.dim() else input[None]
    rng = _common.draw_rng(x.device, generator)
    if _common.transformed():
        kept = keep_mask_2d(rng, p, x.numel() // x.shape[-1], x.shape[-1])
        y = x * kept.view(x.shape) * keep_scale(p)
    else:
        y = _forward(x, rng, p) if _common.direct(x) else _op(x, rng, p)
    return y if input.dim() else y[0]
