"""New queries, keys and values of a decoder made ready in one pass: normed, rotated, and written to the cache."""

import torch

from ..backends import memory
from ..backends.specs import RotaryAppendSpec
from . import _common, _parallel
from ._attention_arguments import check_append
from .rotary import _check_positions, _check_tables, _select, _table


def _forward(
    query, key, value, key_cache, value_cache, lengths, cos, sin, positions, query_weight, key_weight, eps, interleaved
):
    query, key, value = (_common.unit_stride(t).transpose(1, 2) for t in (query, key, value))
    y = memory.empty(tuple(query.shape), query.dtype, query.device)
    if y.numel():
        given = key_cache, value_cache
        caches = [_common.unit_stride(t) for t in given]
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
    """Rotates queries and keys (R) and writes keys and values behind the cached ones: q' = R rms(q), k' = R rms(k).

    rms(x) = weight * x / sqrt(mean(x^2) + eps) over each head where a weight is given, else x. It is one pass on
    the CPU and one launch on a GPU, where nothing waits for the device: a CUDA graph captures it.

    Args:
        query: (B, H, S, D), S new tokens a sequence, any strides; float32, bfloat16, float16, and float64 in plain
            PyTorch.
        key: (B, Hk, S, D), H % Hk == 0.
        value: as key.
        key_cache: (B, Hk, capacity, D), changed in place: row cache_lengths[b] + i gets new key i, rotated.
        value_cache: as key_cache, values as they are.
        cache_lengths: (B,) int, rows in use before; the caller adds S to it. cache_lengths + S <= capacity (not checked
            on a GPU: reading it waits).
        cos: (P, R / 2), a row per position, R <= D; any floating dtype, used in float32 (float64 for float64 query).
        sin: as cos.
        positions: int32 or int64, (B, S), (1, S) or (S,): the row of cos and sin of each new token. Default:
            cache_lengths[b] + i, which must be below P (not checked on a GPU).
        query_weight: (D,), of the RMS norm of each query head (Qwen 3), any floating dtype; None for no norm.
        key_weight: as query_weight.
        eps: of both norms.
        interleaved: as in rotary_embedding.

    Returns:
        The queries, (B, H, S, D), in memory as (B, S, H, D).

    Raises:
        RuntimeError: where a gradient is wanted; there are none. Training rotates by rotary_embedding.
        TypeError, ValueError: naming the argument, what came and what was wanted.

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
