"""Ring attention: keys and values are sent from process to process, every process computes its own queries.

    out = sum over blocks of exp(lse_b - lse) out_b        lse = log of the sum over blocks of exp(lse_b)

No tensor has S x S elements or the length of the whole sequence. Backward sends keys and values around once more,
followed by their gradients in float32. It recomputes each block's out_b and lse_b, which the kernels' backward takes,
with exp(lse_b - lse) grad as the gradient of out_b: one more forward than on one device, instead of all blocks' outputs
in memory.

Source: Liu, Zaharia and Abbeel, "Ring Attention with Blockwise Transformers", 2023.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from ..backends.specs import AttentionSpec
from ..ops._attention_op import _lse_dtype, backward_impl, forward_impl
from .blocks import Rows, blocks, narrow_bias, relative_matrix, sub_call
from .collectives import Ring, wait
from .layout import Layout

__all__ = ["ring_attention"]


class _Call(NamedTuple):
    """The arguments that forward and backward share."""

    spec: AttentionSpec
    layout: Layout
    group: dist.ProcessGroup
    travelling: list[torch.Tensor | None]  # key mask, key bias
    by_column: bool
    queries: Rows
    keys: Rows

    @property
    def dim(self) -> int:
        return 2 if self.spec.cu_seqlens_q is None else 0


def ring_attention(
    spec: AttentionSpec, layout: Layout, group: dist.ProcessGroup, masks: dict[str, bool]
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse of this process's queries. masks: {"mask" or "bias": True if it has the columns of this process's
    keys only, and so is sent around with them}, for those that were given."""
    travelling = [spec.mask if masks.get("mask") else None, spec.bias if masks.get("bias") else None]
    spec = spec._replace(mask=None if masks.get("mask") else spec.mask, bias=None if masks.get("bias") else spec.bias)
    unpadded = spec.cu_seqlens_q is not None
    queries, keys = (
        Rows(cu, t.shape[0] if unpadded else t.shape[2], longest)
        for cu, t, longest in (
            (spec.cu_seqlens_q, spec.query, spec.max_seqlen_q), (spec.cu_seqlens_k, spec.key, spec.max_seqlen_k)
        )
    )  # fmt: skip
    if unpadded and spec.cu_seqlens_k is spec.cu_seqlens_q:
        keys = queries
    by_column = any(t is not None and t.shape[-1] > 1 for t in (spec.mask, spec.bias))
    call = _Call(spec, layout, group, travelling, by_column, queries, keys)
    return _RingAttention.apply(spec.query, spec.key, spec.value, spec.bias, spec.relative_bias, call)


_SAVED = ("query", "key", "value", "bias", "relative_bias")


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, bias, table, call: _Call):
        out, lse = _forward(call)
        ctx.call = call._replace(spec=call.spec._replace(**dict.fromkeys(_SAVED)))  # type: ignore[arg-type]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, bias, table, out, lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_lse):
        query, key, value, bias, table, out, lse = ctx.saved_tensors
        if grad_out is None and grad_lse is None:
            return (None,) * 6
        given = dict(zip(_SAVED, (query, key, value, bias, table)))
        call = ctx.call._replace(spec=ctx.call.spec._replace(**given))
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        return (*_backward(call, grad_out, grad_lse, out, lse, ctx.needs_input_grad[3], ctx.needs_input_grad[4]), None)


def _as_rows(call: _Call, lse: torch.Tensor) -> torch.Tensor:
    """lse (H, total) of unpadded sequences as (total, H); lse of padded ones unchanged."""
    return lse if call.dim else lse.t()


def _start(ring: Ring, key_value: torch.Tensor, travelling: list) -> tuple[torch.Tensor, list, list]:
    present = [t for t in travelling if t is not None]
    (key_value, *came), requests = ring.start([key_value, *present])
    came = iter(came)  # type: ignore[assignment]
    return key_value, [None if t is None else next(came) for t in travelling], requests  # type: ignore[call-overload]


def _home(call: _Call) -> tuple[torch.Tensor, list]:
    """(keys and values, key mask and bias) of this process, contiguous."""
    key_value = torch.stack((call.spec.key, call.spec.value))
    return key_value, [None if t is None else t.contiguous() for t in call.travelling]


def _seed(call: _Call, rank: int, source: int, number: int) -> int:
    return (rank * call.layout.size + source) * 4 + number + 1


def _forward(call: _Call) -> tuple[torch.Tensor, torch.Tensor]:
    ring, spec, size = Ring(call.group), call.spec, call.layout.size
    wide = _lse_dtype(spec.query)
    total = torch.zeros(spec.query.shape, dtype=wide, device=spec.query.device)
    lse = torch.full(total.shape[:-1], -torch.inf, dtype=wide, device=total.device)
    key_value, travelling = _home(call)
    for step in range(size):
        source = (ring.rank - step) % size
        last = step + 1 == size
        arriving: Any = None if last else _start(ring, key_value, travelling)
        for number, block in enumerate(blocks(spec, call.layout, ring.rank, source, call.by_column)):
            sub = sub_call(
                spec, block, call.queries, call.keys, key_value, travelling, _seed(call, ring.rank, source, number)
            )
            _merge(call, total, lse, block.rows, *forward_impl(*sub))
        if not last:
            key_value, travelling, requests = arriving
            wait(requests)
    out = total.to(spec.query.dtype)
    if call.dim:  # in the memory layout of the ops: (B, S, H, D)
        out = out.transpose(1, 2).contiguous().transpose(1, 2)
    return out, _as_rows(call, lse).contiguous()


def _merge(call: _Call, total, lse, rows, out, part) -> None:
    part = _as_rows(call, part)
    before = call.queries.take(lse, rows, call.dim)
    after = torch.logaddexp(before, part)
    base = after.masked_fill(after == -torch.inf, 0.0)
    kept, new = (before - base).exp().unsqueeze(-1), (part - base).exp().unsqueeze(-1)
    call.queries.put(total, rows, call.dim, call.queries.take(total, rows, call.dim) * kept + out * new)
    call.queries.put(lse, rows, call.dim, after)


def _backward(call: _Call, grad_out, grad_lse, out, lse, need_bias: bool, need_table: bool):
    """Gradients to query, key, value, bias and the relative position table."""
    ring, spec, size, dim = Ring(call.group), call.spec, call.layout.size, call.dim
    wide, device = _lse_dtype(spec.query), spec.query.device
    upstream, lse = grad_out.to(wide), _as_rows(call, lse)
    delta = (upstream * out).sum(-1)
    if grad_lse is not None:
        delta = delta - _as_rows(call, grad_lse).masked_fill(lse == -torch.inf, 0.0)
    d_query = torch.zeros(spec.query.shape, dtype=wide, device=device)
    d_bias = None if not need_bias else torch.zeros(spec.bias.shape, dtype=wide, device=device)  # type: ignore[union-attr]
    d_table = None if not need_table else torch.zeros(spec.relative_bias.shape, dtype=wide, device=device)  # type: ignore[union-attr]
    key_value, travelling = _home(call)
    coming: Any = None  # gradients of the current keys, from the processes that had them before
    for step in range(size):
        source = (ring.rank - step) % size
        last = step + 1 == size
        arriving: Any = None if last else _start(ring, key_value, travelling)
        d_key_value = torch.zeros(key_value.shape, dtype=wide, device=device)
        for number, block in enumerate(blocks(spec, call.layout, ring.rank, source, call.by_column)):
            sub = sub_call(
                spec, block, call.queries, call.keys, key_value, travelling, _seed(call, ring.rank, source, number)
            )
            rows, columns = block.rows, block.columns
            part_out, part_lse = forward_impl(*sub)
            part = _as_rows(call, part_lse)
            whole, above = call.queries.take(lse, rows, dim), call.queries.take(upstream, rows, dim)
            share = (part - whole).exp().masked_fill(part == -torch.inf, 0.0)
            above_lse = share * ((above * part_out).sum(-1) - call.queries.take(delta, rows, dim))
            above = (above * share.unsqueeze(-1)).to(spec.query.dtype)
            matrix_needed = need_table and sub.relative_bias is None
            dq, dk, dv, db, dt = backward_impl(
                above, _as_rows(call, above_lse).contiguous(), part_out, part_lse, *sub, need_bias or matrix_needed,
                need_table and not matrix_needed,
            )  # fmt: skip
            call.queries.add(d_query, rows, dim, dq)
            for gradient, found in zip(d_key_value, (dk, dv)):
                call.keys.add(gradient, columns, dim, found)
            if d_bias is not None:
                there = narrow_bias(d_bias, block)
                there += db.sum_to_size(there.shape)
            if d_table is not None:
                d_table += _table_gradient(spec, block, db) if matrix_needed else dt
        if coming is not None:
            wait(coming[1])
            d_key_value += coming[0][0]
        coming = ring.start([d_key_value])
        if not last:
            key_value, travelling, requests = arriving
            wait(requests)
    wait(coming[1])
    d_key, d_value = coming[0][0]
    found = [
        d_query.to(spec.query.dtype), d_key.to(spec.key.dtype), d_value.to(spec.value.dtype),
        None if d_bias is None else d_bias.to(spec.bias.dtype),  # type: ignore[union-attr]
        None if d_table is None else d_table.to(spec.relative_bias.dtype),  # type: ignore[union-attr]
    ]  # fmt: skip
    return found


def _table_gradient(spec: AttentionSpec, block, gradient: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        table = spec.relative_bias.detach().requires_grad_()  # type: ignore[union-attr]
        matrix = relative_matrix(spec, table, block)
    return torch.autograd.grad(matrix, table, gradient.sum_to_size(matrix.shape).to(matrix.dtype))[0]
