"""Attention once more: calls like one that has passed its checks are launched at once (backends/remembered.py)."""

import torch

from ..backends import memory, remembered
from ..backends.contract import Repeat
from ..backends.specs import AttentionSpec, layout
from . import _common
from ._attention_op import (
    QkvSpec,
    attention_op,
    backward,
    choose,
    forward_impl,
    launch,
    launch_backward,
    parts_of,
    qkv_backward,
    qkv_views,
)

__all__ = ["remember", "remember_qkv"]

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
            if self.repeat(q, k, v, None, None, out, lse) is not False:
                return out, lse
        found, self.repeat = launch(AttentionSpec(q, k, v, *self.rest))
        return found

    def gradients(self, signature, q, k, v, grad_out, out, lse):
        repeat = remembered.find(signature)
        if repeat is not None:
            grads = [_rows_of(t) for t in (q, k, v)]
            if repeat(q, k, v, None, None, grad_out, out, lse, *grads) is not False:
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


class _KnownQkv:
    """As _Known, for self-attention on fused projections."""

    def __init__(self, given: QkvSpec):
        self.constants = layout(QkvSpec).constants(given)
        self.longest, self.scale, self.causal, self.p = given.max_seqlen, given.scale, given.causal, given.dropout_p
        self.repeat: Repeat | None = None

    def _spec(self, qkv, cu, rng) -> AttentionSpec:
        return parts_of(QkvSpec(qkv, None, cu, self.longest, rng, self.scale, self.causal, self.p))

    def forward(self, qkv, cu, rng) -> tuple[torch.Tensor, torch.Tensor]:
        *rows, _, h, d = qkv.shape
        if self.repeat is not None:
            out = memory.empty((*rows, h, d), qkv.dtype, qkv.device)
            lse = memory.empty((h, *rows) if cu is not None else (rows[0], h, rows[1]), torch.float32, qkv.device)
            parts = qkv_views(qkv, cu is not None)
            if self.repeat(*parts, cu, rng, _heads(out, cu), lse) is not False:
                return out, lse
        (out, lse), self.repeat = launch(self._spec(qkv, cu, rng))
        return _heads(out, cu), lse

    def gradient(self, signature, qkv, cu, rng, grad_out, out, lse) -> torch.Tensor:
        grad, (grad_out, out) = memory.empty_like(qkv), (_heads(t, cu) for t in (grad_out, out))
        repeat, (dq, dk, dv) = remembered.find(signature), qkv_views(grad, cu is not None)
        if repeat is not None:
            parts = qkv_views(qkv, cu is not None)
            if repeat(*parts, cu, rng, grad_out, out, lse, dq, dk, dv) is not False:
                return grad
        spec = self._spec(qkv, cu, rng)
        repeat = choose(spec, backward=True).attention_backward(spec, grad_out, None, out, lse, dq, dk, dv, None, None)
        if repeat is not None:
            remembered.remember(signature, repeat)
        return grad

    def with_gradients(self, qkv, cu, rng) -> tuple[torch.Tensor, torch.Tensor]:
        return _KnownQkvAttention.apply(qkv, cu, rng, self)


def _heads(t: torch.Tensor, cu: torch.Tensor | None) -> torch.Tensor:
    """(B, S, H, D) as (B, H, S, D) and back; unpadded tensors as they are."""
    return t if cu is not None else t.transpose(1, 2)


class _KnownQkvAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, cu, rng, known):
        out, lse = known.forward(qkv, cu, rng)
        ctx.known, ctx.kind, ctx.constants = known, QkvSpec, known.constants
        ctx.save_for_backward(qkv, None, cu, rng, out, lse)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        signature = None
        if not torch.is_grad_enabled() and grad_out.stride(-1) == 1:
            signature = _common.signature((grad_out,), ctx.known, strided=True)
        if signature is None:
            return _general_qkv_backward(ctx, grad_out, grad_lse)
        qkv, _, cu, rng, out, lse = ctx.saved_tensors
        return ctx.known.gradient(signature, qkv, cu, rng, grad_out, out, lse), None, None, None


_general_qkv_backward = _common.by_position(qkv_backward, ("qkv", "cu_seqlens", "rng", "known"))


def remember_qkv(signature: tuple, given: QkvSpec) -> None:
    """Remember how to make calls of qkv_attention with this signature, where that takes less time than its checks."""
    if choose(parts_of(given)).name in ("triton", "cuda"):
        known = _KnownQkv(given)
        remembered.remember(signature, known.with_gradients if signature[0] else known.forward)
