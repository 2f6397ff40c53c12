"""DeepSpeed-Ulysses: an all-to-all gives each process the whole sequences of some heads, a second one reverses it.

Between the two, attention is called as on one device.

Source: Jacobs et al., "DeepSpeed Ulysses", 2023.
"""

import torch
import torch.distributed as dist

from ..backends.specs import AttentionSpec
from ..ops._attention_op import attention_op
from .collectives import all_gather, exchange
from .layout import Layout

__all__ = ["ulysses_attention"]


def ulysses_attention(
    spec: AttentionSpec, layout: Layout, group: dist.ProcessGroup, masks: dict[str, bool]
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ring_attention. Raises ValueError for a number of heads that the processes cannot share evenly."""
    size, rank = layout.size, dist.get_rank(group)
    dim = 2 if spec.cu_seqlens_q is None else 0
    heads, key_heads = spec.query.shape[1], spec.key.shape[1]
    if heads % size:
        raise ValueError(
            f'query: wanted a number of heads that is a multiple of the {size} processes for "ulysses", got {heads}'
        )
    key, value = spec.key, spec.value
    if key_heads % size:
        if size % key_heads:
            raise ValueError(
                f'key: wanted a number of heads that is a multiple or a divisor of the {size} processes for "ulysses", '
                f"got {key_heads}"
            )
        key, value = (t.repeat_interleave(size // key_heads, 1) for t in (key, value))
    of_queries = layout.restoring(spec.query.shape[dim], spec.cu_seqlens_q, spec.query.device)
    of_keys = layout.restoring(key.shape[dim], spec.cu_seqlens_k, key.device)
    if torch.equal(of_queries, of_keys):
        query, key, value = _to_heads([spec.query, key, value], dim, of_queries, group)
    else:
        (query,) = _to_heads([spec.query], dim, of_queries, group)
        key, value = _to_heads([key, value], dim, of_keys, group)
    mask, bias = (
        _whole(getattr(spec, name), masks.get(name), of_queries, of_keys, rank, size, heads, group)
        for name in ("mask", "bias")
    )
    table, rng = spec.relative_bias, spec.rng
    if table is not None:
        table = table.unflatten(1, (size, -1))[:, rank]
    if rng is not None:
        rng = rng + torch.tensor([(rank + 1) * 0x9E3779B97F4A7C15 % 2**63, 0], device=rng.device)
    cu_q, cu_k = (None if cu is None else cu * size for cu in (spec.cu_seqlens_q, spec.cu_seqlens_k))
    if spec.cu_seqlens_k is spec.cu_seqlens_q:
        cu_k = cu_q
    whole = spec._replace(
        query=query, key=key, value=value, mask=mask, bias=bias, relative_bias=table, rng=rng, cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k, max_seqlen_q=spec.max_seqlen_q * size, max_seqlen_k=spec.max_seqlen_k * size,
    )  # fmt: skip
    out, lse = attention_op(*whole)
    out = _from_heads(out, dim, of_queries, group)
    lse = lse.unsqueeze(-1) if dim else lse.t().unsqueeze(-1)
    lse = _from_heads(lse, dim, of_queries, group).squeeze(-1)
    return out, lse if dim else lse.t()


def _to_heads(tensors: list[torch.Tensor], dim: int, order: torch.Tensor, group) -> list[torch.Tensor]:
    """(B, H, S / n, D) -> (B, H / n, S, D), or (total / n, H, D) -> (total, H / n, D); all tensors in one exchange."""
    size = dist.get_world_size(group)
    parts = [t.unflatten(1, (size, -1)) for t in tensors]
    sizes = [t.shape[2] for t in parts]
    x = exchange(torch.cat(parts, 2).movedim(1, 0), group)  # (n, B, heads, S / n, D) or (n, total / n, heads, D)
    x = x.flatten(0, 1) if dim == 0 else x.movedim(0, 2).flatten(2, 3)
    return list(x.index_select(dim, order).split(sizes, 1))


def _from_heads(x: torch.Tensor, dim: int, order: torch.Tensor, group) -> torch.Tensor:
    """The reverse of _to_heads."""
    size = dist.get_world_size(group)
    x = x.index_select(dim, order.argsort()).unflatten(dim, (size, -1)).movedim(dim, 0)
    x = exchange(x, group)  # (n, B, H / n, S / n, D) or (n, total / n, H / n, D): slice i has the heads of process i
    x = x.movedim(0, 1).flatten(1, 2)
    return x.transpose(1, 2).contiguous().transpose(1, 2) if dim else x


def _whole(t, of_keys_alone, of_queries, of_keys, rank, size, heads, group):
    """A 4-D mask or bias for all positions and this process's heads."""
    if t is None:
        return None
    if of_keys_alone:
        t = all_gather(t, group).movedim(0, 3).flatten(3, 4).index_select(3, of_keys)
    if t.shape[2] > 1:
        t = all_gather(t, group).movedim(0, 2).flatten(2, 3).index_select(2, of_queries)
    return t.narrow(1, rank * heads // size, heads // size) if t.shape[1] > 1 else t
