"""The encoder stack (also a decoder's without generation tricks): attention, feed-forward and norms, packed."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .. import ops
from .packing import Packing, plan_packing
from .projection import add_norm, add_norm_sum, dropout_p, linear, norm, packed_linear
from .spec import LayerWeights, TransformerSpec

__all__ = ["StackCall", "encoder_layer", "plan_call", "run_layers"]


@dataclass
class StackCall:
    """What all layers of one forward pass share.

    packing: which positions are computed. mask: (B or 1, H or 1, Sq or 1, Sk), bool or additive float, or None; with a
    packing that leaves positions out, its key_mask is used instead. causal, bottom_right: as in
    ops.scaled_dot_product_attention. encoder_states: (B, Se, E), encoder_mask: (B, 1, 1, Se) bool or full 4-D, for
    cross-attention. attentions, cross_attentions: {layer: (B, H, Sq, Sk)}, filled when not None.
    """

    spec: TransformerSpec
    packing: Packing
    mask: torch.Tensor | None = None
    causal: bool = False
    bottom_right: bool = False
    encoder_states: torch.Tensor | None = None
    encoder_mask: torch.Tensor | None = None
    attentions: dict[int, torch.Tensor] | None = None
    cross_attentions: dict[int, torch.Tensor] | None = None
    hidden_states: dict[int, torch.Tensor] = field(default_factory=dict)


def plan_call(
    spec: TransformerSpec,
    attention_mask: torch.Tensor | None,
    batch: int,
    length: int,
    device: torch.device,
    *,
    past_key_values: Any = None,
    encoder_states: torch.Tensor | None = None,
    encoder_mask: torch.Tensor | None = None,
    read: torch.Tensor | None = None,
    read_first: bool = False,
    attentions: bool = False,
) -> StackCall:
    """Look at the masks once: choose what is computed and how it is masked.

    attention_mask: None, (B, S) with nonzero for tokens (B, past + S with a cache), (B, Sq, Sk), or 4-D and complete
    in itself (then spec.causal adds nothing). read, read_first: see plan_packing.
    """
    call = StackCall(spec, Packing(batch, length), causal=spec.causal, encoder_states=encoder_states)
    if attentions:
        call.attentions, call.cross_attentions = {}, {}
    if encoder_states is not None and encoder_mask is not None:
        call.encoder_mask = _expand(encoder_mask, "encoder_attention_mask", *encoder_states.shape[:2], device)
    if attention_mask is not None and attention_mask.dim() > 2:
        call.mask = _expand(attention_mask, "attention_mask", batch, None, device)
        call.causal = False
    elif past_key_values is not None:
        padding_free = encoder_mask is None or encoder_mask.dim() == 2
        _plan_cached(
            call, attention_mask, length, device, past_key_values, (read, read_first) if padding_free else None
        )
    elif attention_mask is not None:
        mask = _expand(attention_mask, "attention_mask", batch, length, device)[:, 0, 0]
        if encoder_mask is not None and encoder_mask.dim() > 2:
            call.mask = mask[:, None, None]
        else:
            call.packing = plan_packing(mask, read, read_first)
            call.mask = call.packing.key_mask
    return call


def _expand(mask: torch.Tensor, name: str, batch: int, length: int | None, device: torch.device) -> torch.Tensor:
    """A user's mask as 4-D, a 2-D one as bool."""
    mask = mask.to(device)
    if mask.dim() == 2:
        if mask.shape != (batch, length):
            raise ValueError(f"{name}: wanted shape (batch, length) = {(batch, length)}, got {tuple(mask.shape)}")
        return (mask if mask.dtype == torch.bool else mask != 0)[:, None, None]
    if mask.dim() == 3:
        return mask[:, None]
    if mask.dim() != 4:
        raise ValueError(f"{name}: wanted 2, 3 or 4 dimensions, got shape {tuple(mask.shape)}")
    return mask


def _plan_cached(call: StackCall, attention_mask, length: int, device, past_key_values, read: tuple | None) -> None:
    cache = _self_cache(past_key_values)
    seen = cache.get_seq_length()
    keys, _ = cache.get_mask_sizes(length, 0)
    if attention_mask is not None:
        batch, given = attention_mask.shape
        if batch != call.packing.batch or (isinstance(seen, int) and given != seen + length and given != keys):
            wanted = (call.packing.batch, keys)
            raise ValueError(
                f"attention_mask: wanted shape (batch, past + length) = {wanted}, got {tuple(attention_mask.shape)}"
            )
        mask = _expand(attention_mask, "attention_mask", batch, given, device)
        if given < keys:  # a static cache is longer than what it holds
            mask = nn.functional.pad(mask, (0, keys - given))
        visible = not torch.compiler.is_compiling() and ops.concrete(mask)
        if visible and call.causal and read is not None and isinstance(seen, int) and not seen and keys == length:
            call.packing = plan_packing(mask[:, 0, 0], *read)  # a first call: padding is dropped as without a cache
            call.mask = call.packing.key_mask
            return
        # On the CPU looking is free, and plain attention is faster than masked.
        if device.type != "cpu" or not visible or not bool(mask.all()):
            call.mask = mask
    if not call.causal:
        return
    if isinstance(seen, int) and keys == seen + length and call.attentions is None:
        call.bottom_right = True
        call.causal = length > 1
        return
    seen_by = torch.arange(keys, device=device) <= (torch.arange(length, device=device) + seen)[:, None]
    call.mask = seen_by[None, None] if call.mask is None else call.mask & seen_by
    call.causal = False


def run_layers(
    layers: Iterable[nn.Module],
    rows: torch.Tensor,
    call: StackCall,
    *,
    first_only: bool = False,
    past_key_values: Any = None,
    keep_hidden: Any = (),
) -> torch.Tensor:
    """Call each layer as a module (so hooks, checkpointing and sharding see it) on the packed rows.

    first_only: the last layer computes the first position of each sequence alone and (batch, E) comes back.
    keep_hidden: the indices of the hidden states, 0 for the embedding, to leave in call.hidden_states as
    (batch, length, E).
    """
    layers = list(layers)
    for index, layer in enumerate(layers):
        if index in keep_hidden:
            call.hidden_states[index] = call.packing.unpack(rows)
        last = first_only and index == len(layers) - 1
        rows = layer(rows, call, index, last, past_key_values=past_key_values)
    return rows if layers or not first_only else call.packing.first(rows)


def encoder_layer(
    w: LayerWeights, x: torch.Tensor, call: StackCall, index: int, first_only: bool = False, past_key_values: Any = None
) -> torch.Tensor:
    """x: (B, S, E) or packed (total, E) -> the same, or (B, E) with first_only.

    Source: Vaswani et al., "Attention Is All You Need", 2017, section 3.1; Xiong et al., "On Layer Normalization in
    the Transformer Architecture", 2020, for norm_position "pre".
    """
    post = call.spec.norm_position == "post"
    normed = x if post else norm(w.attention_norm, x)
    mixed = _self_attention(w, normed, call, index, first_only, past_key_values)
    mixed = linear(w.attention_output, mixed)
    residual = call.packing.first(x) if first_only else x
    p, p_out = dropout_p(w.attention_output_dropout), dropout_p(w.output_dropout)
    if post:
        x = add_norm(w.attention_norm, mixed, residual, p)
        if call.encoder_states is not None:
            mixed = linear(_cross(w), _cross_attention(w, x, call, index, past_key_values))
            x = add_norm(w.cross_norm, mixed, x, dropout_p(w.cross_output_dropout))  # type: ignore[arg-type]
        return add_norm(w.output_norm, _feed_forward(w, x, call.spec), x, p_out)
    if call.encoder_states is not None:
        normed, residual = add_norm_sum(_cross_norm(w), mixed, residual, p)  # type: ignore[assignment]
        mixed = linear(_cross(w), _cross_attention(w, normed, call, index, past_key_values))
        p = dropout_p(w.cross_output_dropout)
    normed, residual = add_norm_sum(w.output_norm, mixed, residual, p)  # type: ignore[assignment]
    return residual + ops.dropout(_feed_forward(w, normed, call.spec), p_out)


def _cross(w: LayerWeights) -> nn.Module:
    if w.cross_output is None:
        raise ValueError(
            "encoder_hidden_states: this model has no cross-attention layers; set config.add_cross_attention=True"
        )
    return w.cross_output


def _cross_norm(w: LayerWeights) -> nn.Module:
    _cross(w)
    return w.cross_norm  # type: ignore[return-value]


def _feed_forward(w: LayerWeights, x: torch.Tensor, spec: TransformerSpec) -> torch.Tensor:
    if spec.gated:
        gate = linear(w.gate, x)  # type: ignore[arg-type]
        if spec.activation is None:
            inner = w.activation_fn(linear(w.up, x)) * gate  # type: ignore[misc]
        else:
            inner = ops.bias_activation(linear(w.up, x), None, spec.activation, gate=gate)
    else:
        inner = linear(w.up, x, spec.activation)
        if spec.activation is None:
            inner = w.activation_fn(inner)  # type: ignore[misc]
    return linear(w.down, ops.dropout(inner, dropout_p(w.activation_dropout)))


# ---- attention -------------------------------------------------------------------------------------
def _self_attention(w, x, call: StackCall, index, first_only, past_key_values) -> torch.Tensor:
    """(..., E) -> (..., H * D), before the output projection."""
    spec, packing = call.spec, call.packing
    heads, scale = (spec.num_heads, spec.head_dim), spec.scale_of(index)
    p = dropout_p(w.attention_dropout)
    projections = [w.query, w.key, w.value]
    if w.qkv is not None:
        qkv = linear(w.qkv, x)
    else:
        qkv = None if first_only else packed_linear(projections, x)
    plain = call.mask is None and past_key_values is None and call.attentions is None and not first_only
    if qkv is not None and plain:
        qkv = qkv.unflatten(-1, (3, *heads))
        out = ops.qkv_attention(qkv, packing.cu_seqlens, packing.max_seqlen or None, p, call.causal, scale)
        return out.flatten(-2)
    if qkv is not None:
        q, k, v = qkv.unflatten(-1, (3, *heads)).unbind(-3)
        if first_only:
            q = packing.first(q) if packing.index is not None else q[:, :1]
    elif first_only:
        first = packing.first(x) if packing.index is not None else x[:, :1]
        q = linear(w.query, first).unflatten(-1, heads)
        kv = packed_linear(projections[1:], x)
        if kv is not None:
            k, v = kv.unflatten(-1, (2, *heads)).unbind(-3)
        else:
            k, v = (linear(m, x).unflatten(-1, heads) for m in projections[1:])
    else:
        q, k, v = (linear(m, x).unflatten(-1, heads) for m in projections)
    if packing.index is not None:
        if past_key_values is not None:
            k_rows, v_rows = (packing.unpack(t).transpose(1, 2) for t in (k, v))
            _self_cache(past_key_values).update(k_rows, v_rows, index)
        out = _packed_attention(q, k, v, call, index, first_only, p)
        return out.flatten(-2)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if past_key_values is not None:
        k, v = _self_cache(past_key_values).update(k, v, index)
    mask = call.mask
    if first_only and mask is not None:
        mask = mask[:, :, :1]
    out = _padded_attention(q, k, v, mask, call, call.causal, p, call.attentions, index)
    return out[:, 0] if first_only else out


def _packed_attention(q, k, v, call: StackCall, index, first_only, p):
    packing: Any = call.packing
    scale, cu, longest = call.spec.scale_of(index), packing.cu_seqlens, packing.max_seqlen
    cu_q = torch.arange(packing.batch + 1, dtype=torch.int32, device=q.device) if first_only else cu
    out = ops.varlen_attention(
        q, k, v, cu_q, cu, 1 if first_only else longest, longest, p, call.causal, scale,
        attn_mask=packing.key_mask, return_lse=call.attentions is not None,
    )  # fmt: skip
    if call.attentions is None:
        return out
    out, lse = out
    lse = packing.unpack(lse.t(), fill=-float("inf")).transpose(1, 2)
    call.attentions[index] = _probabilities(
        packing.unpack(q).transpose(1, 2), packing.unpack(k).transpose(1, 2), lse, scale=scale,
        attn_mask=packing.mask[:, None, None], is_causal=call.causal,
    )  # fmt: skip
    return out


def _padded_attention(q, k, v, mask, call: StackCall, causal: bool, p: float, weights: dict | None, index: int):
    """q, k, v: (B, H, S, D) -> (B, Sq, H * D)."""
    scale = call.spec.scale_of(index)
    out = ops.scaled_dot_product_attention(
        q, k, v, mask, p, causal, scale,
        causal_alignment="bottom_right" if call.bottom_right else "top_left", return_lse=weights is not None,
    )  # fmt: skip
    if weights is not None:
        out, lse = out
        weights[index] = _probabilities(
            q, k, lse, scale=scale, is_causal=causal,
            attn_mask=mask,
        )  # fmt: skip
    return out.transpose(1, 2).flatten(-2)


def _probabilities(q, k, lse, **masks) -> torch.Tensor:
    weights = ops.attention_probabilities(q, k, lse, **masks)
    if weights.dtype not in (torch.float32, torch.float64):
        return weights
    # The scores here and those inside lse were rounded apart: make rows sum to one again.
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1.0)


def _cross_attention(w, x, call: StackCall, index, past_key_values) -> torch.Tensor:
    spec, packing = call.spec, call.packing
    states: Any = call.encoder_states
    heads = (spec.num_heads, spec.head_dim)
    p = dropout_p(w.cross_dropout)
    q = linear(w.cross_query, x).unflatten(-1, heads)
    cache = past_key_values if hasattr(past_key_values, "cross_attention_cache") else None
    if cache is not None and cache.is_updated.get(index):
        stored = cache.cross_attention_cache.layers[index]
        k, v = stored.keys, stored.values
    else:
        if w.cross_key_value is not None:
            kv = linear(w.cross_key_value, states)
        else:
            kv = packed_linear([w.cross_key, w.cross_value], states)
        if kv is not None:
            k, v = kv.unflatten(-1, (2, *heads)).permute(2, 0, 3, 1, 4)
        else:
            k, v = (linear(m, states).unflatten(-1, heads).transpose(1, 2) for m in (w.cross_key, w.cross_value))
        if cache is not None:
            k, v = cache.cross_attention_cache.update(k, v, index)
            cache.is_updated[index] = True
    if packing.index is not None:  # queries take their place again: few rows beside the encoder's
        q = packing.unpack(q)
    rows, length = q.shape[:2]
    if rows != k.shape[0]:  # rows that continue one prompt (beams) are queries of its one set of keys
        q = q.reshape(k.shape[0], -1, *heads)
    out = _padded_attention(
        q.transpose(1, 2), k, v, call.encoder_mask, call, False, p, call.cross_attentions, index
    )  # fmt: skip
    out = out.view(rows, length, -1)
    return out if packing.index is None else packing.pack(out)


def _self_cache(past_key_values):
    return getattr(past_key_values, "self_attention_cache", past_key_values)
