"""Prepares the new queries, keys and values of a decoder in one pass: RMS norm, rotation and append to the cache."""

import torch

from ..backends import memory
from ..backends.specs import RotaryAppendSpec
from . import _common, _parallel
from ._attention_arguments import check_append
from .rotary import _check_positions, _check_tables, _select, _table


def _forward(
    query, key, value, key_cache, value_cache, lengths, cos, sin, positions, query_weight, key_weight, eps, interleaved
):
    query, key, value = (memory.unit_stride(t).transpose(1, 2) for t in (query, key, value))
    y = memory.empty(tuple(query.shape), query.dtype, query.device)
    if y.numel():
        given = key_cache, value_cache
        caches = [memory.unit_stride(t) for t in given]
        spec = RotaryAppendSpec(
            query, key, value, *caches, lengths, _table(cos, query), _table(sin, query), positions,
            *(None if w is None else w.detach().contiguous() for w in (query_weight, key_weight)), eps, interleaved,
        )  # fmt: skip
        _select(query, interleaved).rotary_append(spec, y)
        for cache, filled in zip(given, caches):
            if cache is not filled:
                cache.copy_(filled)
    return y.transpose(1, 2)


def _fake(query, *_):
    b, h, n, d = query.shape
    return query.new_empty((b, n, h, d)).transpose(1, 2)


_op = _common.define(
    "rotary_cache_append",
    "(Tensor query, Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor cache_lengths, "
    "Tensor cos, Tensor sin, Tensor? positions, Tensor? query_weight, Tensor? key_weight, float eps, bool interleaved) "
    "-> Tensor",
    _forward,
    _fake,
)


def rotary_cache_append(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cache_lengths: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None = None,
    *,
    query_weight: torch.Tensor | None = None,
    key_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    interleaved: bool = False,
) -> torch.Tensor:
    """q' = R rms(q), k' = R rms(k), with R the rotation: norm and rotate queries and keys, and append keys and values
    to the caches in place.

    rms(x) = weight * x / sqrt(mean(x^2) + eps) over each head if a weight is given, else x. It is one pass on the CPU
    and one launch on a GPU, which never synchronises, so a CUDA graph can capture it.

    Args:
        query: (B, H, S, D), S new tokens per sequence, any strides; float16, bfloat16 or float32 (float64 in plain
            PyTorch).
        key: (B, Hk, S, D), query's dtype, H % Hk == 0.
        value: (B, Hk, S, D), query's dtype.
        key_cache: (B, Hk, capacity, D), query's dtype; changed in place: row cache_lengths[b] + i becomes new key i,
            normed and rotated.
        value_cache: (B, Hk, capacity, D); changed in place: row cache_lengths[b] + i becomes new value i, unchanged.
        cache_lengths: (B,) int32 or int64, rows in use before the call; the caller adds S afterwards. cache_lengths + S
            must be at most capacity; this is not checked on a GPU, where it would synchronise.
        cos: (P, R / 2), one row per position, R <= D; any floating dtype, used in float32 (float64 for float64 query).
        sin: as cos.
        positions: int32 or int64, (B, S), (1, S) or (S,): the row of cos and sin of each new token. Default:
            cache_lengths[b] + i, which must be below P (not checked on a GPU).
        query_weight: (D,), any floating dtype: the weight of the RMS norm of each query head, as in Qwen 3; None for no
            norm.
        key_weight: as query_weight, for key heads.
        eps: added to the mean square in both norms.
        interleaved: as in rotary_embedding.

    Returns:
        The normed and rotated queries, (B, H, S, D), in memory as (B, S, H, D).

    Raises:
        RuntimeError: if a gradient is needed; the op has none. For training use rotary_embedding.
        TypeError, ValueError: if an argument is invalid; the message names it, its value and what is expected.

    Source:
        Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021, section 3.2.

    Examples:
        >>> import torch, transformer_fast
        >>> q, k, v = torch.randn(3, 2, 4, 1, 32).unbind()  # one new token in each of two sequences
        >>> keys, values, lengths = torch.zeros(2, 4, 64, 32), torch.zeros(2, 4, 64, 32), torch.tensor([10, 3])
        >>> angles = torch.arange(64)[:, None] * 10000.0 ** -(torch.arange(16) / 16)
        >>> q = transformer_fast.rotary_cache_append(q, k, v, keys, values, lengths, angles.cos(), angles.sin())
        >>> out = transformer_fast.scaled_dot_product_attention(q, keys, values, key_lengths=lengths + 1)
    """
    _parallel.refuse("rotary_cache_append", "decode with whole sequences")
    check_append(query, key, value, key_cache, value_cache, cache_lengths)
    b, _, n, d = query.shape
    _check_tables(query, cos, sin)
    for name, weight in (("query_weight", query_weight), ("key_weight", key_weight)):
        _common.check_vector(name, weight, d, query)
    _common.check_number("eps", eps, 0.0)
    _common.check_flag("interleaved", interleaved)
    if positions is not None:
        positions = _check_positions(positions, (b, n), cos)
    elif cache_lengths.device.type == "cpu" and b and n and _common.concrete(cache_lengths):
        last = int(cache_lengths.max()) + n
        if last > cos.shape[0]:
            raise ValueError(f"cos: wanted a row for each of the {last} positions, got {cos.shape[0]}")
    _common.refuse_gradients("rotary_cache_append", query, key, value, key_cache, value_cache, query_weight, key_weight)
    return _op(
        query, key, value, key_cache, value_cache, cache_lengths, cos, sin, positions, query_weight, key_weight,
        float(eps), bool(interleaved),
    )  # fmt: skip
