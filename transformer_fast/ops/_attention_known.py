"""Attention once more: calls like one that has passed its checks are launched at once (backends/remembered.py)."""

import torch

from ..backends import memory, remembered
from ..backends.contract import Repeat
from ..backends.specs import AttentionSpec, layout
from . import _common
from ._attention_op import attention_op, backward, forward_impl, launch, launch_backward

__all__ = ["remember"]

_LAYOUT = layout(AttentionSpec)
_NONE = (None,) * (_LAYOUT.tensor_count - 3)


class _Known:
    """A kind of call with query, key and value alone. repeat: launches it; None before the first call, and where the
    backend cannot repeat it."""

    def __init__(self, spec: AttentionSpec):
        self.rest, self.constants = spec[3:], _LAYOUT.constants(spec)
        self.repeat: Repeat | None = None

    def forward(self, q, k, v) -> tuple[torch.Tensor, torch.Tensor]:
        if self.repeat is not None:
            out, lse = _rows_of(q), memory.empty(q.shape[:3], torch.float32, q.device)
            if self.repeat(q, k, v, out, lse) is not False:
                return out, lse
        found, self.repeat = launch(AttentionSpec(q, k, v, *self.rest))
        return found

    def gradients(self, signature, q, k, v, grad_out, out, lse):
        repeat = remembered.find(signature)
        if repeat is not None:
            grads = [_rows_of(t) for t in (q, k, v)]
            if repeat(q, k, v, grad_out, out, lse, *grads) is not False:
                return grads
        grads, repeat = launch_backward(AttentionSpec(q, k, v, *self.rest), grad_out, out, lse)
        if repeat is not None:
            remembered.remember(signature, repeat)
        return grads

    def with_gradients(self, q, k, v) -> tuple[torch.Tensor, torch.Tensor]:
        return _KnownAttention.apply(q, k, v, self)


def _rows_of(t: torch.Tensor) -> torch.Tensor:
    """An output (B, H, S, D) with the memory layout (B, S, H, D)."""
    b, h, s, d = t.shape
    return memory.empty_strided((b, h, s, d), (s * h * d, d, h * d, 1), t.dtype, t.device)


class _KnownAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, known):
        out, lse = known.forward(q, k, v)
        ctx.known, ctx.kind, ctx.constants = known, AttentionSpec, known.constants
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, *_NONE, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        signature = None
        if grad_out is not None and grad_lse is None and not torch.is_grad_enabled():
            signature = _common.signature((grad_out,), ctx.known, strided=True)
        if signature is None:
            return _general_backward(ctx, grad_out, grad_lse)
        q, k, v, *_, out, lse = ctx.saved_tensors
        return *ctx.known.gradients(signature, q, k, v, grad_out, out, lse), None


_general_backward = _common.by_position(backward, ("query", "key", "value", "known"), ("bias", "relative_bias"))


def remember(signature: tuple, spec: AttentionSpec, chosen: str) -> None:
    """Remember how to make calls with this signature. chosen: the name of their backend."""
    known, needed = _Known(spec), signature[0]
    rest = known.rest
    if chosen in ("triton", "cuda"):
        remembered.remember(signature, known.with_gradients if needed else known.forward)
    elif needed:
        remembered.remember(signature, lambda q, k, v: attention_op(q, k, v, *rest))
    else:
        remembered.remember(signature, lambda q, k, v: forward_impl(q, k, v, *rest))
