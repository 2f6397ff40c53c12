"""Self-attention and cross-attention of a layer, on padded or unpadded rows, with and without a cache."""

from typing import Any

import torch

from .. import ops
from ..ops.linear_int8 import attention_dtype
from .planning import StackCall, self_cache
from .projection import dropout_p, linear, norm, norm_of, projections
from .unpadding import Unpadding

__all__ = ["cross_attention", "self_attention"]


def self_attention(w, x, call: StackCall, index, first_only, past_key_values, int8: bool = False) -> torch.Tensor:
    """(..., E) -> (..., H * D), before the output projection. int8: the output projection is int8 and takes any
    dtype."""
    spec, unpadding = call.spec, call.unpadding
    heads, scale = (spec.num_heads, spec.head_dim), spec.scale_of(index)
    p = dropout_p(w.attention_dropout)
    placed = call.rotary is not None or w.query_norm is not None
    plain = call.mask is None and past_key_values is None and call.attentions is None and not (first_only or placed)
    plain = plain and call.relative_bias is None
    dtype = attention_dtype(x) if int8 and plain else None
    cache = None if past_key_values is None else self_cache(past_key_values)
    place = _place_with_append(w, x, call, index) if hasattr(cache, "attend") else None
    placed = placed and place is None
    sizes = (spec.num_heads, spec.heads_of_keys, spec.heads_of_keys)
    relative, bias = call.relative_of(w)
    if w.qkv is not None:
        qkv = linear(w.qkv, x) if dtype is None else projections([w.qkv], x, dtype)[0]
        if plain and not (_is_special(call, index) or spec.qkv_by_head):
            qkv = qkv.unflatten(-1, (3, *heads))
            out = ops.qkv_attention(qkv, unpadding.cu_seqlens, unpadding.max_seqlen or None, p, call.causal, scale)
            return out.flatten(-2)
        if spec.qkv_by_head:
            q, k, v = qkv.unflatten(-1, (spec.num_heads, 3, spec.head_dim)).unbind(-2)
        else:
            qkv = qkv.unflatten(-1, (-1, spec.head_dim))
            q, k, v = qkv.split(sizes, -2)
            if placed and w.query_norm is None:  # rotate queries and keys, which are adjacent, in one call
                both = call.rotary_of(index)(qkv[..., : -sizes[2], :], spec.rotary_interleaved)  # type: ignore[misc]
                (q, k), placed = both.split(sizes[:2], -2), False
    elif first_only and not placed:
        first = unpadding.first(x) if unpadding.index is not None else x[:, :1]
        q = linear(w.query, first).unflatten(-1, heads)
        k, v = (t.unflatten(-1, (-1, spec.head_dim)) for t in projections([w.key, w.value], x))
    else:
        found = projections([w.query, w.key, w.value], x, dtype)
        q, k, v = (t.unflatten(-1, (-1, spec.head_dim)) for t in found)
    if placed:
        q, k = _placed(w, q, k, call, index)
    if first_only and (w.qkv is not None or call.rotary is not None or w.query_norm is not None):
        q = unpadding.first(q) if unpadding.index is not None else q[:, :1]
    if unpadding.index is not None:
        if past_key_values is not None:
            k_rows, v_rows = (unpadding.pad(t).transpose(1, 2) for t in (k, v))
            self_cache(past_key_values).update(k_rows, v_rows, index)
        out = _unpadded_attention(q, k, v, call, index, first_only, p, bias, relative)
        return out.flatten(-2)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if past_key_values is not None:
        assert cache is not None
        if hasattr(cache, "attend"):  # this cache appends and attends in one op
            out = cache.attend(
                q, k, v, index, place, scale=scale, relative_bias=relative, window=_window(call, index),
                softcap=spec.softcap,
            )  # fmt: skip
            return out.transpose(1, 2).flatten(-2)
        k, v = cache.update(k, v, index)
    mask = call.mask
    if first_only and mask is not None:
        mask = mask[:, :, :1]
    if mask is not None and mask.shape[-1] > k.shape[2]:
        mask = mask[..., -k.shape[2] :]  # the cache keeps only the keys of a window
    if bias is not None and mask is not None and mask.dtype != torch.bool:
        mask, bias = mask + bias, None
    out = _padded_attention(
        q, k, v, mask, call, call.causal, p, call.attentions, index, bias=bias, relative_bias=relative,
        window=_window(call, index), softcap=spec.softcap,
    )  # fmt: skip
    return out[:, 0] if first_only else out


def _placed(w, q, k, call: StackCall, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply the norms of the heads and the rotation to queries and keys."""
    if w.query_norm is not None:
        q, k = norm(w.query_norm, q), norm(w.key_norm, k)
    rotary = call.rotary_of(index)
    if rotary is not None:
        q, k = (rotary(t, call.spec.rotary_interleaved) for t in (q, k))
    return q, k


def _place_with_append(w, x, call: StackCall, index: int) -> dict[str, Any] | None:
    """The arguments of ops.rotary_cache_append for a layer; None if that op does not compute the same."""
    rotary = call.rotary_of(index)
    if rotary is None:
        return None
    place: dict[str, Any] = {**rotary._asdict(), "interleaved": call.spec.rotary_interleaved}
    if w.query_norm is None:
        return place
    norms = [norm_of(module) for module in (w.query_norm, w.key_norm)]
    wanted = ((call.spec.head_dim,), x.dtype)
    weights: list[Any] = [None if n is None or not n[1] else n[0].weight for n in norms]
    if any(weight is None or (weight.shape, weight.dtype) != wanted for weight in weights):
        return None
    (query, _), (key, _) = norms  # type: ignore[misc]
    place |= {"query_weight": query.weight, "key_weight": key.weight, "eps": query.eps}
    return place if query.eps == key.eps else None


def _is_special(call: StackCall, index: int) -> bool:
    """Whether a layer has shared key heads, a soft cap or a window."""
    spec = call.spec
    return bool(spec.heads_of_keys != spec.num_heads or spec.softcap or _window(call, index))


def _window(call: StackCall, index: int) -> tuple[int, int | None] | None:
    window = call.spec.window_of(index) if call.windowed else None
    return None if window is None else (window - 1, None if call.spec.causal else window - 1)


def _unpadded_attention(q, k, v, call: StackCall, index, first_only, p, bias, relative):
    unpadding: Any = call.unpadding
    scale, cu, longest = call.spec.scale_of(index), unpadding.cu_seqlens, unpadding.max_seqlen
    cu_q = torch.arange(unpadding.batch + 1, dtype=torch.int32, device=q.device) if first_only else cu
    if call.attentions is not None and (torch.is_grad_enabled() or _is_special(call, index)):
        q, k, v = (unpadding.pad(t).transpose(1, 2) for t in (q, k, v))
        mask = unpadding.mask[:, None, None]
        out, call.attentions[index] = _weighted(
            q, k, v, mask, call, call.causal, p, index, bias=bias, window=_window(call, index),
            softcap=call.spec.softcap,
        )  # fmt: skip
        return unpadding.unpad(out)
    out = ops.varlen_attention(
        q, k, v, cu_q, cu, 1 if first_only else longest, longest, p, call.causal, scale,
        attn_mask=unpadding.key_mask, relative_bias=relative, return_lse=call.attentions is not None,
        window=_window(call, index), softcap=call.spec.softcap,
    )  # fmt: skip
    if call.attentions is None:
        return out
    out, lse = out
    lse = unpadding.pad(lse.t(), fill=-float("inf")).transpose(1, 2)
    call.attentions[index] = _probabilities(
        unpadding.pad(q).transpose(1, 2), unpadding.pad(k).transpose(1, 2), lse, scale=scale,
        attn_mask=unpadding.mask[:, None, None], is_causal=call.causal, bias=bias,
    )  # fmt: skip
    return out


def _padded_attention(
    q, k, v, mask, call: StackCall, causal: bool, p: float, weights: dict | None, index: int, *, bias=None,
    relative_bias=None, key_lengths=None, window=None, softcap=0.0,
):  # fmt: skip
    """q: (B, H, Sq, D), k, v: (B, key heads, Sk, D) -> (B, Sq, H * D)."""
    scale = call.spec.scale_of(index)
    if weights is not None and (torch.is_grad_enabled() or _is_special(call, index)):
        if key_lengths is not None:
            mask = (torch.arange(k.shape[2], device=k.device) < key_lengths[:, None])[:, None, None]
        out, weights[index] = _weighted(
            q, k, v, mask, call, causal, p, index, bias=bias, window=window, softcap=softcap
        )
        return out.flatten(-2)
    out = ops.scaled_dot_product_attention(
        q, k, v, mask, p, causal, scale, bias=bias, relative_bias=relative_bias, key_lengths=key_lengths,
        causal_alignment="bottom_right" if call.bottom_right else "top_left", return_lse=weights is not None,
        enable_gqa=k.shape[1] != q.shape[1], window=window, softcap=softcap,
    )  # fmt: skip
    if weights is not None:
        out, lse = out
        weights[index] = _probabilities(
            q, k, lse, scale=scale, is_causal=causal, attn_mask=mask, bias=bias, key_lengths=key_lengths
        )
    return out.transpose(1, 2).flatten(-2)


def _weighted(
    q, k, v, mask, call: StackCall, causal: bool, p: float, index: int, *, bias=None, window=None, softcap=0.0
):  # fmt: skip
    """(out (B, Sq, H, D), weights (B, H, Sq, Sk)). out is computed from the weights, so that they get its gradient,
    which attribution methods need. mask, bias: as in ops.scaled_dot_product_attention."""
    scale = call.spec.scale_of(index)
    wide = torch.promote_types(q.dtype, torch.float32)
    if k.shape[1] != q.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = (q.to(wide) @ k.to(wide).transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    for added in (bias, None if mask is None or mask.dtype == torch.bool else mask):
        scores = scores if added is None else scores + added
    seen = mask if mask is not None and mask.dtype == torch.bool else None
    sq, sk = scores.shape[-2:]
    shift = sk - sq if call.bottom_right else 0
    every = torch.ones(sq, sk, dtype=torch.bool, device=q.device)
    if causal:
        seen = every.tril(shift) if seen is None else seen & every.tril(shift)
    if window is not None:
        near = every.triu(shift - window[0])
        near = near if window[1] is None else near.tril(shift + window[1])
        seen = near if seen is None else seen & near
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    nothing = (scores == -torch.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0).to(q.dtype)
    return (ops.dropout(weights, p) @ v).transpose(1, 2), weights


def _probabilities(q, k, lse, **masks) -> torch.Tensor:
    weights = ops.attention_probabilities(q, k, lse, **masks)
    if weights.dtype not in (torch.float32, torch.float64):
        return weights
    # These scores and those in lse were rounded separately: make the rows sum to one again.
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1.0)


def cross_attention(w, x, states, call: StackCall, index, past_key_values) -> torch.Tensor:
    spec, unpadding, source = call.spec, call.unpadding, call.encoder_unpadding
    heads = (spec.num_heads, spec.head_dim)
    p = dropout_p(w.cross_dropout)
    q = linear(w.cross_query, x).unflatten(-1, heads)
    cache = past_key_values if hasattr(past_key_values, "cross_attention_cache") else None
    if cache is not None and cache.is_updated.get(index):
        stored = cache.cross_attention_cache.layers[index]
        k, v = stored.keys, stored.values
    else:
        if w.cross_key_value is not None:
            k, v = linear(w.cross_key_value, states).unflatten(-1, (2, *heads)).unbind(-3)
        else:
            k, v = (t.unflatten(-1, heads) for t in projections([w.cross_key, w.cross_value], states))
        lengths_known = call.encoder_mask is None or source is not None
        padding = _is_unpadded(unpadding) or _is_unpadded(source)
        if padding and lengths_known and cache is None and call.cross_attentions is None:
            return _unpadded_cross_attention(q, k, v, call, index, p)
        if _is_unpadded(source):
            k, v = source.pad(k), source.pad(v)  # type: ignore[union-attr]
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.cross_attention_cache.update(k, v, index)
            cache.is_updated[index] = True
    if _is_unpadded(unpadding):  # pad the queries again; they are few compared with the encoder's rows
        q = unpadding.pad(q)
    rows, length = q.shape[:2]
    if rows != k.shape[0]:  # beams of one prompt are further queries on its keys
        q = q.reshape(k.shape[0], -1, *heads)
    out = _padded_attention(
        q.transpose(1, 2), k, v, call.encoder_mask, call, False, p, call.cross_attentions, index,
        key_lengths=call.encoder_lengths,
    )  # fmt: skip
    return unpadding.unpad(out.view(rows, length, out.shape[-1]))


def _unpadded_cross_attention(q, k, v, call: StackCall, index: int, p: float) -> torch.Tensor:
    """Cross-attention without padding on either side. q: (total, H, D) or (B, Sq, H, D); k, v: (total, H, D) or
    (B, Se, H, D)."""
    shape, source = q.shape, call.encoder_unpadding
    (q, cu_q, longest_q), (k, cu_k, longest_k) = _sequences(q, call.unpadding), _sequences(k, source)
    v = _sequences(v, source)[0]
    out = ops.varlen_attention(
        q, k, v, cu_q, cu_k, longest_q, longest_k, p, False, call.spec.scale_of(index),
        attn_mask=None if source is None else source.key_mask,
    )  # fmt: skip
    return out.view(shape).flatten(-2)


def _sequences(t: torch.Tensor, unpadding: Unpadding | None) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(rows, cu_seqlens, max_seqlen) of padded or unpadded rows. All documents in a batch row attend to the row's
    encoder states."""
    if unpadding is not None and unpadding.index is not None:
        if not unpadding.documents:
            return t, unpadding.cu_seqlens, unpadding.max_seqlen  # type: ignore[return-value]
        t = unpadding.pad(t)
    batch, length = t.shape[:2]
    cu = torch.arange(batch + 1, dtype=torch.int32, device=t.device) * length
    return t.flatten(0, 1), cu, length


def _is_unpadded(unpadding: Unpadding | None) -> bool:
    return unpadding is not None and unpadding.index is not None
