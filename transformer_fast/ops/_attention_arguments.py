"""The arguments of attention: T5's relative bias, and the input checks."""

import math
from typing import NamedTuple

import torch

from ..backends.eager import relative_buckets
from ..backends.philox import threshold
from . import _common, _parallel
from ._attention_op import (
    CAUSAL,
)


class RelativeBias(NamedTuple):
    """T5's bucketed relative position bias. Kernels compute it on the fly; the (H, Sq, Sk) matrix is never stored.

    Attributes:
        table: (num_buckets, H), floating point; gets a gradient.
        max_distance: distances from here on share the last bucket (T5's relative_attention_max_distance).
        bidirectional: True uses half of the buckets for keys after the query (T5's encoder); False puts all keys after
            the query into bucket 0 (T5's decoder).

    Source:
        Raffel et al., "Exploring the Limits of Transfer Learning", 2020, section 2.1.

    Examples:
        >>> import torch, transformer_fast
        >>> q, k, v = torch.randn(3, 1, 4, 16, 32).unbind()
        >>> bias = transformer_fast.RelativeBias(torch.randn(32, 4), max_distance=128, bidirectional=True)
        >>> transformer_fast.scaled_dot_product_attention(q, k, v, relative_bias=bias, scale=1.0).shape
        torch.Size([1, 4, 16, 32])
    """

    table: torch.Tensor
    max_distance: int = 128
    bidirectional: bool = True

    def matrix(self, positions: torch.Tensor, keys: int) -> torch.Tensor:
        """The bias as a matrix (1, H, Sq, keys), for queries at `positions` (Sq,) and keys at 0 .. keys - 1.

        Args:
            positions: (Sq,) int, the positions of the queries.
            keys: the number of keys.

        Returns:
            (1, H, Sq, keys) in the table's dtype, differentiable.
        """
        distance = torch.arange(keys, device=positions.device) - positions[:, None]
        buckets = relative_buckets(distance, self.table.shape[0], self.max_distance, self.bidirectional)
        return self.table[buckets].permute(2, 0, 1)[None]


def autocasts(t: torch.Tensor) -> bool:
    return _common.autocast_dtype(t.device) is not None


def autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    dtype = _common.autocast_dtype(tensors[0].device)
    return tensors if dtype is None else tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def check_head_dim(name: str, d: int) -> None:
    if not 1 <= d <= 256:
        raise ValueError(f"{name}: wanted a head dim in 1..256, got {d}")


def check_qkv(query, key, value) -> None:
    """query, key, value: (B, H, S, D) or (total, H, D)."""
    _common.check_same("key", key, "query", query)
    _common.check_same("value", value, "query", query)
    d, h, hk = query.shape[-1], query.shape[1], key.shape[1]
    check_head_dim("query", d)
    if key.shape[-1] != d:
        raise ValueError(f"key: wanted head dim {d} as query has, got {key.shape[-1]}")
    if value.shape[-1] != d:
        raise ValueError(f"value: wanted head dim {d} as query has, got {value.shape[-1]}")
    if value.shape[1] != hk:
        raise ValueError(f"value: wanted {hk} heads as key has, got {value.shape[1]}")
    if h == 0 or hk == 0 or h % hk:
        raise ValueError(f"key: wanted a number of heads that divides query's {h}, got {hk}")


def check_alignment(alignment: str) -> None:
    if not isinstance(alignment, str) or alignment not in CAUSAL:
        raise ValueError(f"causal_alignment: wanted 'top_left' or 'bottom_right', got {alignment!r}")


def check_softcap(softcap: float) -> None:
    """softcap >= 0; 0 switches it off."""
    _common.check_number("softcap", softcap, 0.0)


def split_mask(attn_mask, bias, shape, query):
    """Returns (bool mask, float bias), each None or 4-D and broadcastable to `shape` (B, H, Sq, Sk)."""
    mask, name = None, "bias"
    if attn_mask is not None:
        _common.check_tensor("attn_mask", attn_mask)
        if attn_mask.dtype == torch.bool:
            mask = attn_mask
        elif attn_mask.is_floating_point():
            if bias is not None:
                raise ValueError("bias: give one float bias, either as attn_mask or as bias, got both")
            bias, name = attn_mask, "attn_mask"
        else:
            raise TypeError(f"attn_mask: wanted bool or a float dtype, got {attn_mask.dtype}")
    if bias is not None:
        _common.check_floating(name, bias)
    return _broadcastable("attn_mask", mask, shape, query), _broadcastable(name, bias, shape, query)


def _broadcastable(name, t, shape, query):
    if t is None:
        return None
    if t.device != query.device:
        raise ValueError(f"{name}: is on {t.device} but query is on {query.device}; wanted the same device")
    spread = _parallel.current()
    # Under context_parallel a mask may have the columns of all processes.
    if spread is not None and t.dim() and t.shape[-1] == shape[-1] * spread.size:
        shape = (*shape[:-1], t.shape[-1])
    if t.dim() > 4 or any(n not in (1, m) for n, m in zip(t.shape[::-1], shape[::-1])):
        raise ValueError(f"{name}: wanted a shape that broadcasts to (B, H, Sq, Sk) = {shape}, got {tuple(t.shape)}")
    return t if t.dim() == 4 else t.view((1,) * (4 - t.dim()) + tuple(t.shape))


def check_integers(name, t, reference) -> None:
    _common.check_integers(name, t)
    if t.device != reference.device:
        raise ValueError(f"{name}: is on {t.device} but query is on {reference.device}; wanted the same device")


# Larger windows and lengths are reduced to this: longer than any sequence, but 32-bit positions do not overflow.
_FARTHEST = 2**30


def check_lengths(name, lengths, batch, longest, reference) -> None:
    check_integers(name, lengths, reference)
    if lengths.shape != (batch,):
        raise ValueError(f"{name}: wanted shape ({batch},), got {tuple(lengths.shape)}")
    # Values are only checked on the CPU: on a GPU that would synchronise, and the kernels clamp them.
    if readable(lengths) and batch:
        low, high = (int(v) for v in lengths.aminmax())
        if low < 0 or high > longest:
            raise ValueError(f"{name}: wanted values in [0, {longest}], got {low}..{high}")


def check_append(query, key, value, key_cache, value_cache, lengths) -> None:
    """Check new rows query (B, H, S, D), key and value (B, Hk, S, D) against caches (B, Hk, capacity, D), which need
    room for S more rows after the `lengths` (B,) rows in use."""
    for name, t in (("query", query), ("key", key), ("value", value)):
        _common.check_floating(name, t)
        if t.dim() != 4:
            raise ValueError(f"{name}: wanted 4 dimensions (B, H, S, D), got shape {tuple(t.shape)}")
    check_qkv(query, key, value)
    b, _, n, d = query.shape
    for name, t in (("key", key), ("value", value)):
        if t.shape[0] != b or t.shape[2] != n:
            raise ValueError(f"{name}: wanted batch {b} and {n} new rows as query has, got shape {tuple(t.shape)}")
    for name, t in (("key_cache", key_cache), ("value_cache", value_cache)):
        _common.check_floating(name, t)
    wanted = (b, key.shape[1], key_cache.shape[2] if key_cache.dim() == 4 else "capacity", d)
    for name, t in (("key_cache", key_cache), ("value_cache", value_cache)):
        _common.check_same(name, t, "query", query)
        if tuple(t.shape) != wanted:
            raise ValueError(f"{name}: wanted shape {wanted}, got {tuple(t.shape)}")
    if n > key_cache.shape[2]:
        raise ValueError(f"key_cache: wanted room for {n} new rows, got {key_cache.shape[2]}")
    check_lengths("cache_lengths", lengths, b, key_cache.shape[2] - n, query)


def check_cu_seqlens(name, cu, reference, longest):
    check_integers(name, cu, reference)
    longest_name = name.replace("cu_seqlens", "max_seqlen")
    if longest is not None:
        _common.check_integer(longest_name, longest, 0)
        longest = min(longest if isinstance(longest, torch.SymInt) else int(longest), _FARTHEST)
    if cu.dim() != 1 or cu.shape[0] < 1:
        raise ValueError(f"{name}: wanted shape (B + 1,), got {tuple(cu.shape)}")
    if readable(cu):
        values = cu.tolist()
        steps = [b - a for a, b in zip(values, values[1:])]
        if values[0] != 0 or values[-1] != reference.shape[0] or any(s < 0 for s in steps):
            raise ValueError(
                f"{name}: wanted values that start at 0, never fall and end at {reference.shape[0]} (the rows), "
                f"got {values[:8]}{'...' if len(values) > 8 else ''}"
            )
        found = max(steps, default=0)
        if longest is not None and longest < found:
            raise ValueError(f"{longest_name}: wanted at least {found} (the longest of {name}), got {longest}")
        longest = found if longest is None else longest
    elif longest is None:
        longest = int((cu[1:] - cu[:-1]).max()) if cu.shape[0] > 1 else 0
    return cu.to(torch.int32), longest


def readable(t: torch.Tensor) -> bool:
    return _common.concrete(t) and t.device.type == "cpu" and not torch.compiler.is_compiling()


def check_window(window) -> tuple[int, int]:
    if window is None:
        return -1, -1
    if not isinstance(window, (tuple, list)):
        raise TypeError(f"window: wanted (left, right) or None, got {type(window).__name__}")
    if len(window) != 2:
        raise ValueError(f"window: wanted (left, right), got {window!r}")
    for w in window:
        if w is not None:
            _common.check_integer("window", w, -1)
    left, right = (-1 if w is None else int(min(w, _FARTHEST)) for w in window)
    return left, right


def check_relative(relative: RelativeBias | None, query) -> tuple[torch.Tensor | None, int, bool]:
    if relative is None:
        return None, 0, False
    if not isinstance(relative, RelativeBias):
        raise TypeError(f"relative_bias: wanted a RelativeBias, got {type(relative).__name__}")
    table = relative.table
    _common.check_flag("relative_bias.bidirectional", relative.bidirectional)
    _common.check_floating("relative_bias.table", table)
    heads = query.shape[1]
    buckets = table.shape[0] if table.dim() == 2 else 0
    least = 4 if relative.bidirectional else 2
    if table.dim() != 2 or table.shape[1] != heads or buckets < least or (relative.bidirectional and buckets % 2):
        raise ValueError(
            f"relative_bias.table: wanted shape (num_buckets >= {least}{', even' if relative.bidirectional else ''}, "
            f"H = {heads}), got {tuple(table.shape)}"
        )
    exact = buckets // (4 if relative.bidirectional else 2)
    _common.check_integer("relative_bias.max_distance", relative.max_distance, 0)
    if relative.max_distance <= exact:
        raise ValueError(f"relative_bias.max_distance: wanted more than {exact}, got {relative.max_distance}")
    _common.check_same("relative_bias.table", table, "query", query, dtype=False)
    return table, int(relative.max_distance), bool(relative.bidirectional)


def dropout_state(p: float, device, generator) -> tuple[torch.Tensor | None, float, bool]:
    """Returns (rng, p, drop_all). The kernels do not handle a probability of 1; then p is 0 and drop_all is True."""
    _common.check_probability("dropout_p", p)
    if p == 1.0:
        return None, 0.0, True
    if threshold(p) == 0:
        return None, 0.0, False
    return _common.draw_rng(device, generator), float(p), False


def scale_or_default(scale: float | None, d: int) -> float:
    if scale is None:
        return 1.0 / math.sqrt(d)
    _common.check_number("scale", scale)
    return float(scale)
