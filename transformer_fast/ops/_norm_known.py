"""Norms once more: calls like one that has passed its checks are launched at once (backends/remembered.py)."""

import torch

from ..backends import memory, remembered
from ..backends.contract import Repeat
from ..backends.specs import NormSpec
from . import _common
from ._norm_op import backward, choose, launch, launch_backward, norm_op

__all__ = ["keeps", "remember"]


def keeps(residual, p: float, need_sum: bool) -> bool:
    """Whether v = residual + dropout(x) is kept. The backward pass needs it; without residual and dropout it is x."""
    return need_sum or residual is not None or p > 0


class _Known:
    """A kind of call that has passed its checks. repeat: launches it; None before the first call."""

    def __init__(self, x, weight, bias, eps: float, rms: bool, p: float, keep: bool):
        self.repeat: Repeat | None = None
        self.rms, self.p, self.keep, self.constants = rms, p, keep, (eps, rms, p)
        self.rows = x.numel() // x.shape[-1]
        self.bias_dtype = None if bias is None else bias.dtype
        self.parameter_dtype = torch.float32 if weight is None else weight.dtype

    def without_gradients(self, x, residual, weight, bias, rng) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.repeat is None:
            found, self.repeat = launch(x, residual, weight, bias, rng, *self.constants, self.keep, False)
            return found[:2]
        y = memory.empty_like(x)
        total = memory.empty_like(x) if self.keep else None
        self.repeat(x, residual, weight, bias, rng, y, total, None, None)
        return y, total

    def with_gradients(self, x, residual, weight, bias, rng) -> tuple[torch.Tensor, torch.Tensor | None]:
        return _KnownNorm.apply(x, residual, weight, bias, rng, self)


class _KnownNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, rng, known):
        if known.repeat is None:
            found, known.repeat = launch(x, residual, weight, bias, rng, *known.constants, known.keep, True)
            y, total, mean, rstd = found
        else:
            y = memory.empty_like(x)
            total = memory.empty_like(x) if known.keep else None
            mean = None if known.rms else memory.empty((known.rows,), torch.float32, x.device)
            rstd = memory.empty((known.rows,), torch.float32, x.device)
            known.repeat(x, residual, weight, bias, rng, y, total, mean, rstd)
        ctx.known, ctx.need_sum, ctx.bias_dtype = known, known.keep, known.bias_dtype
        ctx.kind, ctx.constants = NormSpec, known.constants
        ctx.save_for_backward(total if known.keep else x, None, weight, None, rng, mean, rstd)
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    def backward(ctx, grad_y, grad_sum):
        known, needs = ctx.known, ctx.needs_input_grad
        signature = None
        if grad_y is not None and not torch.is_grad_enabled():
            signature = _common.signature((grad_y, grad_sum), known, needs[2:4])
        if signature is None or known.bias_dtype not in (None, known.parameter_dtype):
            return _general_backward(ctx, grad_y, grad_sum)
        v, _, weight, _, rng, mean, rstd = ctx.saved_tensors
        repeat = remembered.find(signature)
        if repeat is None:
            spec = NormSpec(v, None, weight, None, rng, *known.constants)
            found, repeat = launch_backward(grad_y, grad_sum, mean, rstd, *spec, *needs[2:4])
            if repeat is not None:
                remembered.remember(signature, repeat)
            grad_v, grad_x, grad_weight, grad_bias = found
        else:
            grad_v = memory.empty_like(v)
            grad_x = memory.empty_like(v) if known.p else None
            shape, dtype = v.shape[-1:], known.parameter_dtype
            grad_weight = memory.empty(shape, dtype, v.device) if needs[2] else None
            grad_bias = memory.empty(shape, dtype, v.device) if needs[3] else None
            repeat(grad_y, grad_sum, v, weight, rng, mean, rstd, grad_v, grad_x, grad_weight, grad_bias)
        return grad_x if known.p else grad_v, grad_v if needs[1] else None, grad_weight, grad_bias, None, None


_general_backward = _common.by_position(backward, ("x", "residual", "weight", "bias", "rng", "known"))


def remember(signature: tuple, x, residual, weight, bias, rng, eps: float, rms: bool, p: float, need_sum: bool):
    """Make the first call with this signature, and remember how. Returns y and the sum, with which more may follow."""
    chosen, needed = choose(x, residual, p, rms), signature[0]
    keep = keeps(residual, p, need_sum) if needed else need_sum
    if chosen.name in ("cpu", "eager"):

        def call(x, residual, weight, bias, rng):
            if needed:
                return norm_op(x, residual, weight, bias, rng, eps, rms, p, keep, True)
            return chosen.norm(x, residual, weight, bias, rng, eps, rms, p, need_sum)

        if needed or chosen.name == "cpu":
            remembered.remember(signature, call)
            return call(x, residual, weight, bias, rng)
    known = _Known(x, weight, bias, eps, rms, p, keep)
    call = known.with_gradients if needed else known.without_gradients
    found = call(x, residual, weight, bias, rng)
    if known.repeat is not None:
        remembered.remember(signature, call)
    return found
