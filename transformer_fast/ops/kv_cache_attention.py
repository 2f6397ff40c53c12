"""Attention of new tokens over a preallocated key-value cache, with an in-place append."""

import torch

from ..backends import memory
from ..backends.specs import AttentionSpec
from . import _common, _parallel
from ._attention_arguments import (
    RelativeBias,
    check_append,
    check_relative,
    check_softcap,
    check_window,
    scale_or_default,
)
from ._attention_op import _lse_shape, _out_like, _unit_stride, choose


def _forward(query, key, value, key_cache, value_cache, lengths, table, distance, bidirectional, scale, left, softcap):
    n, capacity = query.shape[2], key_cache.shape[2]
    spec = AttentionSpec(
        query=query, key=key_cache, value=value_cache, bias=None, mask=None, key_lengths=lengths, cu_seqlens_q=None,
        cu_seqlens_k=None, max_seqlen_q=n, max_seqlen_k=capacity, relative_bias=table, relative_max_distance=distance,
        relative_bidirectional=bidirectional, rng=None, scale=scale, bottom_right=1, window_left=left, window_right=0,
        softcap=softcap, dropout_p=0.0,
    )  # fmt: skip
    out = _out_like(query)
    lse = memory.empty(_lse_shape(query), torch.promote_types(query.dtype, torch.float32), query.device)
    if out.numel() == 0:
        return out, lse
    query, key, value = map(memory.unit_stride, (query, key, value))
    chosen = choose(spec)
    if key_cache.stride(-1) == value_cache.stride(-1) == 1:
        chosen.attention_append(spec._replace(query=query), key, value, out, lse)
        return out, lse
    whole = _unit_stride(spec)
    chosen.attention_append(whole, key, value, out, lse)
    for cache, filled in ((key_cache, whole.key), (value_cache, whole.value)):
        if cache is not filled:
            cache.copy_(filled)
    return out, lse


def _fake(query, *_):
    b, h, n, d = query.shape
    lse = query.new_empty((b, h, n), dtype=torch.promote_types(query.dtype, torch.float32))
    return query.new_empty((b, n, h, d)).transpose(1, 2), lse


_op = _common.define(
    "kv_cache_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor cache_lengths, "
    "Tensor? relative_bias, int relative_max_distance, bool relative_bidirectional, float scale, int window_left, "
    "float softcap) -> (Tensor, Tensor)",
    _forward,
    _fake,
)


def kv_cache_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cache_lengths: torch.Tensor,
    *,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    relative_bias: RelativeBias | None = None,
    return_lse: bool = False,
):
    """Append key and value to the caches in place, then compute causal softmax(scale * Q K^T) V over the caches.

    New token i has position cache_lengths[b] + i and attends to the keys up to that position, limited by the left side
    of `window`. The Triton kernel appends and attends in one launch.

    Args:
        query: (B, H, S, D), S new tokens per sequence; float16, bfloat16 or float32 (float64 in plain PyTorch).
        key: (B, Hk, S, D), query's dtype, H % Hk == 0.
        value: (B, Hk, S, D), query's dtype.
        key_cache: (B, Hk, capacity, D), query's dtype; changed in place: row cache_lengths[b] + i becomes key i.
        value_cache: (B, Hk, capacity, D), as key_cache.
        cache_lengths: (B,) int32 or int64, rows in use before the call; the caller adds S afterwards. cache_lengths + S
            must be at most capacity; this is not checked on a GPU, where it would synchronise.
        scale: default 1 / sqrt(D).
        window: (left, right), as in scaled_dot_product_attention.
        softcap: c > 0; 0 is off.
        relative_bias: T5's relative position bias.
        return_lse: also return the log-sum-exp of the scores.

    Returns:
        The output (B, H, S, D). With return_lse a tuple of it and the log-sum-exp, (B, H, S) float32.

    Raises:
        RuntimeError: if a gradient is needed; the op has none.
        TypeError, ValueError: if an argument is invalid; the message names it, its value and what is expected.

    Source:
        Dao et al., "Flash-Decoding for long-context inference", 2023.

    Examples:
        >>> import torch, transformer_fast
        >>> q, k, v = torch.randn(3, 2, 4, 1, 32).unbind()  # one new token in each of two sequences
        >>> keys, values, lengths = torch.zeros(2, 4, 64, 32), torch.zeros(2, 4, 64, 32), torch.tensor([10, 3])
        >>> transformer_fast.kv_cache_attention(q, k, v, keys, values, lengths).shape
        torch.Size([2, 4, 1, 32])
    """
    _parallel.refuse("kv_cache_attention", "decode with whole sequences")
    check_append(query, key, value, key_cache, value_cache, cache_lengths)
    _common.refuse_gradients("kv_cache_attention", query, key, value, key_cache, value_cache)
    check_softcap(softcap)
    table, distance, bidirectional = check_relative(relative_bias, query)
    out, lse = _op(
        query, key, value, key_cache, value_cache, cache_lengths, table, distance, bidirectional,
        scale_or_default(scale, query.shape[-1]), check_window(window)[0], float(softcap),
    )  # fmt: skip
    return (out, lse) if return_lse else out
