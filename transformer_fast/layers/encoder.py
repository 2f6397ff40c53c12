"""The encoder stack (also a decoder's without generation tricks): attention, feed-forward and norms, packed."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import ops
from ..ops.linear_int8 import Int8BlockWeights, attention_dtype, int8_block
from .disentangled import Disentangled
from .packing import (
    Packing,
    padding_is_computed,
    plan_documents,
    plan_packing,
    positions_kept,
    spread_in_use,
)
from .projection import add_norm, add_norm_sum, dropout_p, linear, norm, norm_of, projections
from .quantized import block_weights, is_int8
from .spec import LayerWeights, TransformerSpec

__all__ = ["Rotary", "StackCall", "encoder_layer", "plan_call", "run_layers"]


class Rotary(NamedTuple):
    """cos, sin: float32 (rows, R / 2); positions: the row of each position, as ops.rotary_embedding takes it."""

    cos: torch.Tensor
    sin: torch.Tensor
    positions: torch.Tensor | None

    @classmethod
    def of(cls, packing: Packing, cos: torch.Tensor, sin: torch.Tensor) -> "Rotary":
        """From cos and sin (B or 1, S, R / 2) of every position of the batch."""
        own, index = cos.shape[0] > 1, packing.index
        if index is not None:
            positions = index if own else index % packing.length
        elif own:
            positions = torch.arange(packing.batch * packing.length, device=cos.device).view(packing.batch, -1)
        else:
            positions = None
        return cls(cos.flatten(0, 1), sin.flatten(0, 1), positions)

    def __call__(self, x: torch.Tensor, interleaved: bool) -> torch.Tensor:
        """x: (B, S, H, D) or (total, H, D)."""
        return ops.rotary_embedding(x, self.cos, self.sin, self.positions, interleaved=interleaved)


@dataclass
class StackCall:
    """What all layers of one forward pass share.

    packing: which positions are computed. mask: (B or 1, H or 1, Sq or 1, Sk), bool or additive float, or None; with a
    packing that leaves positions out, its key_mask is used instead. causal, bottom_right: as in
    ops.scaled_dot_product_attention. relative_bias: added to the scores of self-attention; bias: the same as a matrix,
    (1, H, Sq, Sk), made only where probabilities are wanted or a cache is longer than what it holds.
    encoder_states: (B, Se, E), or the packed rows of encoder_packing; encoder_mask: (B, 1, 1, Se) bool or full 4-D, for
    cross-attention; encoder_lengths: (B,), says the same where padding is on the right.
    attentions, cross_attentions: {layer: (B, H, Sq, Sk)}, filled when not None.
    windowed: False where a mask that is complete in itself takes the place of spec.windows. rotary: of queries, keys;
    one for each layer where layers differ. disentangled: takes the place of self-attention; distances: the table it
    reads.
    """

    spec: TransformerSpec
    packing: Packing
    windowed: bool = True
    rotary: "Rotary | Sequence[Rotary] | None" = None
    mask: torch.Tensor | None = None
    causal: bool = False
    bottom_right: bool = False
    relative_bias: ops.RelativeBias | None = None
    bias: torch.Tensor | None = None
    disentangled: Disentangled | None = None
    distances: torch.Tensor | None = None
    encoder_states: torch.Tensor | None = None
    encoder_packing: Packing | None = None
    encoder_mask: torch.Tensor | None = None
    encoder_lengths: torch.Tensor | None = None
    attentions: dict[int, torch.Tensor] | None = None
    cross_attentions: dict[int, torch.Tensor] | None = None
    hidden_states: dict[int, torch.Tensor] = field(default_factory=dict)

    def rotary_of(self, index: int) -> "Rotary | None":
        return self.rotary if self.rotary is None or isinstance(self.rotary, Rotary) else self.rotary[index]


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
    encoder_packing: Packing | None = None,
    relative_bias: ops.RelativeBias | None = None,
    documents: torch.Tensor | None = None,
    read: torch.Tensor | None = None,
    read_first: bool = False,
    attentions: bool = False,
) -> StackCall:
    """Look at the masks once: choose what is computed and how it is masked.

    attention_mask: None, (B, S) with nonzero for tokens (B, past + S with a cache), (B, Sq, Sk), or 4-D and complete
    in itself (then spec.causal adds nothing). encoder_packing: encoder_states are its rows, else (B, Se, E).
    relative_bias: distances count the positions between two tokens, padding too. documents: (B, S), the one that each
    position belongs to and that alone it sees; without attention_mask and cache only. read, read_first: see
    plan_packing.
    """
    spread = spread_in_use()
    call = StackCall(
        spec, Packing(batch, length, spread=spread), causal=spec.causal, relative_bias=relative_bias,
        encoder_states=encoder_states,
    )  # fmt: skip
    if spread is not None:
        _check_spread(past_key_values, attentions)
    if attentions:
        call.attentions, call.cross_attentions = {}, {}
    if encoder_states is not None:
        _plan_cross(call, encoder_mask, encoder_packing, past_key_values)
    if attention_mask is not None and attention_mask.dim() > 2:
        call.mask = _expand(attention_mask, "attention_mask", batch, None, device)
        call.causal = call.windowed = False
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
            _drop_padding(call, mask, read, read_first)
    elif documents is not None:
        _plan_documents(call, documents.to(device))
    if relative_bias is not None:
        _plan_relative(call, length, device, past_key_values)
    return call


def _check_spread(past_key_values, attentions: bool) -> None:
    if attentions:
        raise NotImplementedError("output_attentions: wanted False under context_parallel, which keeps no weights")
    seen = 0 if past_key_values is None else past_key_values.get_seq_length()
    if not isinstance(seen, int) or seen:
        raise NotImplementedError(
            "past_key_values: a cache cannot be read under context_parallel; wanted none, so generate outside it"
        )


def _plan_documents(call: StackCall, documents: torch.Tensor) -> None:
    if not torch.compiler.is_compiling() and ops.concrete(documents) and call.attentions is None:
        call.packing = plan_documents(documents)
        return
    together = documents[:, :, None] == documents[:, None]
    call.mask = (together.tril() if call.causal else together)[:, None]
    call.causal = False


def _drop_padding(call: StackCall, mask: torch.Tensor, read: torch.Tensor | None, read_first: bool) -> None:
    if call.packing.spread is not None:  # all parts are of one length
        call.mask = mask[:, None, None]
        return
    placed = call.relative_bias is not None or call.spec.disentangled or any(call.spec.windows)
    if placed:  # what lies between two tokens keeps its place
        read = _span(positions_kept(mask, read, read_first))
    if padding_is_computed():
        read = torch.ones_like(mask)
    call.packing = plan_packing(mask, read, read_first)
    call.mask = call.packing.key_mask


def _span(mask: torch.Tensor) -> torch.Tensor:
    """(B, S): True from the first True of each row to its last."""
    return (mask.cumsum(1) > 0) & (mask.flip(1).cumsum(1).flip(1) > 0)


def _plan_relative(call: StackCall, length: int, device, past_key_values) -> None:
    seen, keys = 0, length
    if past_key_values is not None:
        cache = _self_cache(past_key_values)
        seen, keys = cache.get_seq_length(), cache.get_mask_sizes(length, 0)[0]
    aligned = isinstance(seen, int) and keys == seen + length
    if aligned and past_key_values is not None:
        call.bottom_right = True
    if call.attentions is None and aligned:
        return
    call.bias = call.relative_bias.matrix(torch.arange(length, device=device) + seen, keys)  # type: ignore[union-attr]
    if call.mask is not None and call.mask.dtype != torch.bool:
        call.mask, call.bias = call.mask + call.bias, None
    if call.packing.index is None:
        call.relative_bias = None


def _plan_cross(call: StackCall, mask, packing: Packing | None, past_key_values) -> None:
    states: Any = call.encoder_states
    if call.packing.spread is not None:  # nothing was dropped
        packing = None
    if packing is None and mask is not None:
        mask = _expand(mask, "encoder_attention_mask", states.shape[0], states.shape[1], states.device)
        if mask.dtype != torch.bool or mask.shape[1:3] != (1, 1) or call.packing.spread is not None:
            call.encoder_mask = mask
            return
        if _all_stored(past_key_values):  # the states are not looked at
            call.encoder_mask = mask
            _shorten(call)
            return
        packing = plan_packing(mask[:, 0, 0])
        call.encoder_states = packing.pack(states)
    call.encoder_packing = packing
    if packing is not None and packing.mask is not None:
        call.encoder_mask = packing.mask[:, None, None]
        if past_key_values is not None:
            _shorten(call)


def _all_stored(past_key_values) -> bool:
    stored: Any = getattr(past_key_values, "is_updated", None)
    return bool(stored) and all(stored.values())


def _shorten(call: StackCall) -> None:
    """The encoder's mask as lengths where it says no more than they do, and looking is free."""
    mask: Any = call.encoder_mask
    if mask.device.type != "cpu" or torch.compiler.is_compiling() or not ops.concrete(mask):
        return
    rows = mask[:, 0, 0]
    lengths = rows.sum(1)
    if torch.equal(rows, torch.arange(rows.shape[1]) < lengths[:, None]):
        call.encoder_mask, call.encoder_lengths = None, lengths


def _expand(mask: torch.Tensor, name: str, batch: int, length: int | None, device: torch.device) -> torch.Tensor:
    """A user's mask as 4-D, a 2-D one as bool."""
    mask = mask.to(device)
    if mask.dim() == 2:
        if mask.shape[0] not in (1, batch) or mask.shape[1] != length:
            raise ValueError(f"{name}: wanted shape (batch, length) = {(batch, length)}, got {tuple(mask.shape)}")
        return (mask if mask.dtype == torch.bool else mask != 0).expand(batch, length)[:, None, None]
    if mask.dim() not in (3, 4):
        raise ValueError(f"{name}: wanted 2, 3 or 4 dimensions, got shape {tuple(mask.shape)}")
    mask = mask if mask.dtype == torch.bool or mask.is_floating_point() else mask != 0
    return mask[:, None] if mask.dim() == 3 else mask


def _plan_cached(call: StackCall, attention_mask, length: int, device, past_key_values, read: tuple | None) -> None:
    cache = _self_cache(past_key_values)
    seen = cache.get_seq_length()
    # Layers with a window keep the last keys alone: each cuts the mask to what it holds.
    keys = seen + length if call.spec.windows else cache.get_mask_sizes(length, 0)[0]
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
            _drop_padding(call, mask[:, 0, 0], *read)  # a first call: padding is dropped as without a cache
            return
        # On the CPU looking is free, and plain attention is faster than masked.
        if device.type != "cpu" or not visible or not bool(mask.all()):
            call.mask = mask
    if not call.causal:
        return
    if isinstance(seen, int) and keys == seen + length and call.attentions is None:
        call.bottom_right = True
        call.causal = length > 1 or call.packing.spread is not None
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
            call.hidden_states[index], rows = call.packing.show(rows)
        last = first_only and index == len(layers) - 1
        # By position: reentrant checkpointing differentiates with respect to these alone.
        states = tuple(t for t in (call.encoder_states, call.distances) if t is not None)
        rows = layer(rows, call, index, last, *states, past_key_values=past_key_values)
    return rows if layers or not first_only else call.packing.first(rows)


def encoder_layer(
    w: LayerWeights,
    x: torch.Tensor,
    call: StackCall,
    index: int,
    first_only: bool = False,
    past_key_values: Any = None,
    encoder_states: torch.Tensor | None = None,
    distances: torch.Tensor | None = None,
) -> torch.Tensor:
    """x: (B, S, E) or packed (total, E) -> the same, or (B, E) with first_only. encoder_states, distances: call's.

    Source: Vaswani et al., "Attention Is All You Need", 2017, section 3.1; Xiong et al., "On Layer Normalization in
    the Transformer Architecture", 2020, for norm_position "pre".
    """
    before = spread = call.packing.spread
    if spread is not None:  # checkpointing calls again when the context may have been left
        before = ops.parallel.set_current(spread)
    try:
        return _encoder_layer(w, x, call, index, first_only, past_key_values, encoder_states, distances)
    finally:
        if spread is not None:
            ops.parallel.set_current(before)


def _encoder_layer(w: LayerWeights, x, call: StackCall, index, first_only, past_key_values, encoder_states, distances):
    post = call.spec.norm_position == "post"
    normed = x if post else norm(w.attention_norm, x)
    block = _int8_block(w, x, call.spec) if encoder_states is None and is_int8(w.down) else None
    if call.disentangled is not None:
        sizes, scale = (call.spec.num_heads, call.spec.head_dim), call.spec.scale
        mixed = call.disentangled.attend(w, normed, distances, sizes, scale, call.attentions, index)  # type: ignore[arg-type]
        mixed = call.packing.first(mixed) if first_only else mixed
    else:
        mixed = _self_attention(w, normed, call, index, first_only, past_key_values, block is not None)
    if block is not None:
        return int8_block(mixed, call.packing.first(x) if first_only else x, block)
    mixed = linear(w.attention_output, mixed)
    residual = call.packing.first(x) if first_only else x
    p, p_out = dropout_p(w.attention_output_dropout), dropout_p(w.output_dropout)
    if post:
        x = add_norm(w.attention_norm, mixed, residual, p)
        if encoder_states is not None:
            mixed = linear(_cross(w), _cross_attention(w, x, encoder_states, call, index, past_key_values))
            x = add_norm(w.cross_norm, mixed, x, dropout_p(w.cross_output_dropout))  # type: ignore[arg-type]
        return _clamped(add_norm(w.output_norm, _feed_forward(w, x, call.spec), x, p_out), call.spec)
    if w.attention_after_norm is not None:
        mixed = norm(w.attention_after_norm, mixed)
    if encoder_states is not None:
        normed, residual = _sum_norm(_cross_norm(w), mixed, residual, p, call.spec)
        mixed = linear(_cross(w), _cross_attention(w, normed, encoder_states, call, index, past_key_values))
        p = dropout_p(w.cross_output_dropout)
    if call.spec.parallel:
        inner = _feed_forward(w, norm(w.output_norm, residual), call.spec)
        return residual + ops.dropout(mixed, p) + ops.dropout(inner, p_out)
    normed, residual = _sum_norm(w.output_norm, mixed, residual, p, call.spec)
    inner = _feed_forward(w, normed, call.spec)
    if w.output_after_norm is not None:
        inner = norm(w.output_after_norm, inner)
    return _clamped(residual + ops.dropout(inner, p_out), call.spec)


def _int8_block(w: LayerWeights, x: torch.Tensor, spec: TransformerSpec) -> Int8BlockWeights | None:
    """The layer after attention as one op, where it is int8 and none of it is somebody else's."""
    dropouts = (w.attention_output_dropout, w.activation_dropout, w.output_dropout)
    if (
        (torch.is_grad_enabled() and x.requires_grad)
        or any(dropout_p(d) for d in dropouts)
        or spec.parallel
        or not (w.attention_after_norm is None and w.output_after_norm is None)
        or (spec.clamp_float16 and x.dtype == torch.float16)
    ):
        return None
    if spec.parallel or w.attention_after_norm is not None or w.output_after_norm is not None:
        return None
    after, output = norm_of(w.attention_norm), norm_of(w.output_norm)
    if after is None or output is None or after[1] != output[1]:
        return None
    post = spec.norm_position == "post"
    return block_weights(w, spec, after[0] if post else None, output[0], output[1])


def _sum_norm(module, x, residual, p: float, spec: TransformerSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm(s), s) with s = residual + dropout(x), clamped where the family does."""
    if spec.clamp_float16 and x.dtype == residual.dtype == torch.float16:
        total = _clamped(residual + ops.dropout(x, p), spec)
        return norm(module, total), total
    return add_norm_sum(module, x, residual, p)  # type: ignore[return-value]


def _clamped(x: torch.Tensor, spec: TransformerSpec) -> torch.Tensor:
    if not spec.clamp_float16 or x.dtype != torch.float16:
        return x
    largest = torch.finfo(x.dtype).max
    bound = torch.where(x.isinf().any(), largest - 1000, largest)  # without waiting for the device
    return x.clamp(-bound, bound)


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
        up = linear(w.up, x)
        up, gate = up.chunk(2, -1) if w.gate is None else (up, linear(w.gate, x))
        if spec.activation is None:
            inner = w.activation_fn(up) * gate  # type: ignore[misc]
        else:
            inner = ops.bias_activation(up, None, spec.activation, gate=gate)
    else:
        inner = linear(w.up, x, spec.activation)
        if spec.activation is None:
            inner = w.activation_fn(inner)  # type: ignore[misc]
    inner = ops.dropout(inner, dropout_p(w.activation_dropout))
    weight = getattr(w.down, "weight", None)  # T5 keeps it in float32 when the rest is float16
    if isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.dtype != inner.dtype:
        inner = inner.to(weight.dtype)
    return linear(w.down, inner)


# ---- attention -------------------------------------------------------------------------------------
def _self_attention(w, x, call: StackCall, index, first_only, past_key_values, int8: bool = False) -> torch.Tensor:
    """(..., E) -> (..., H * D), before the output projection. int8: that takes any dtype."""
    spec, packing = call.spec, call.packing
    heads, scale = (spec.num_heads, spec.head_dim), spec.scale_of(index)
    p = dropout_p(w.attention_dropout)
    placed = call.rotary is not None or w.query_norm is not None
    plain = call.mask is None and past_key_values is None and call.attentions is None and not (first_only or placed)
    plain = plain and call.relative_bias is None
    dtype = attention_dtype(x) if int8 and plain else None
    sizes = (spec.num_heads, spec.heads_of_keys, spec.heads_of_keys)
    if w.qkv is not None:
        qkv = linear(w.qkv, x) if dtype is None else projections([w.qkv], x, dtype)[0]
        if plain and not _is_special(call, index):
            qkv = qkv.unflatten(-1, (3, *heads))
            out = ops.qkv_attention(qkv, packing.cu_seqlens, packing.max_seqlen or None, p, call.causal, scale)
            return out.flatten(-2)
        qkv = qkv.unflatten(-1, (-1, spec.head_dim))
        q, k, v = qkv.split(sizes, -2)
        if placed and w.query_norm is None:  # side by side they are rotated by one call
            both = call.rotary_of(index)(qkv[..., : -sizes[2], :], spec.rotary_interleaved)  # type: ignore[misc]
            (q, k), placed = both.split(sizes[:2], -2), False
    elif first_only and not placed:
        first = packing.first(x) if packing.index is not None else x[:, :1]
        q = linear(w.query, first).unflatten(-1, heads)
        k, v = (t.unflatten(-1, (-1, spec.head_dim)) for t in projections([w.key, w.value], x))
    else:
        found = projections([w.query, w.key, w.value], x, dtype)
        q, k, v = (t.unflatten(-1, (-1, spec.head_dim)) for t in found)
    if placed:
        q, k = _placed(w, q, k, call, index)
    if first_only and (w.qkv is not None or call.rotary is not None or w.query_norm is not None):
        q = packing.first(q) if packing.index is not None else q[:, :1]
    if packing.index is not None:
        if past_key_values is not None:
            k_rows, v_rows = (packing.unpack(t).transpose(1, 2) for t in (k, v))
            _self_cache(past_key_values).update(k_rows, v_rows, index)
        out = _packed_attention(q, k, v, call, index, first_only, p)
        return out.flatten(-2)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if past_key_values is not None:
        cache = _self_cache(past_key_values)
        if hasattr(cache, "attend"):  # it extends itself while it is read
            return cache.attend(q, k, v, index, scale, call.relative_bias).transpose(1, 2).flatten(-2)
        k, v = cache.update(k, v, index)
    mask = call.mask
    if first_only and mask is not None:
        mask = mask[:, :, :1]
    if mask is not None and mask.shape[-1] > k.shape[2]:
        mask = mask[..., -k.shape[2] :]  # a cache that keeps the keys of a window alone
    out = _padded_attention(
        q, k, v, mask, call, call.causal, p, call.attentions, index, bias=call.bias, relative_bias=call.relative_bias,
        window=_window(call, index), softcap=spec.softcap,
    )  # fmt: skip
    return out[:, 0] if first_only else out


def _placed(w, q, k, call: StackCall, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys with the norms of their heads and their rotation."""
    if w.query_norm is not None:
        q, k = norm(w.query_norm, q), norm(w.key_norm, k)
    rotary = call.rotary_of(index)
    if rotary is not None:
        q, k = (rotary(t, call.spec.rotary_interleaved) for t in (q, k))
    return q, k


def _is_special(call: StackCall, index: int) -> bool:
    """Whether the scores of a layer are more than products of as many queries as keys."""
    spec = call.spec
    return bool(spec.heads_of_keys != spec.num_heads or spec.softcap or _window(call, index))


def _window(call: StackCall, index: int) -> tuple[int, int | None] | None:
    window = call.spec.window_of(index) if call.windowed else None
    return None if window is None else (window - 1, None if call.spec.causal else window - 1)


def _packed_attention(q, k, v, call: StackCall, index, first_only, p):
    packing: Any = call.packing
    scale, cu, longest = call.spec.scale_of(index), packing.cu_seqlens, packing.max_seqlen
    cu_q = torch.arange(packing.batch + 1, dtype=torch.int32, device=q.device) if first_only else cu
    if call.attentions is not None and (torch.is_grad_enabled() or _is_special(call, index)):
        q, k, v = (packing.unpack(t).transpose(1, 2) for t in (q, k, v))
        mask = packing.mask[:, None, None]
        out, call.attentions[index] = _weighted(
            q, k, v, mask, call, call.causal, p, index, bias=call.bias, window=_window(call, index),
            softcap=call.spec.softcap,
        )  # fmt: skip
        return packing.pack(out)
    out = ops.varlen_attention(
        q, k, v, cu_q, cu, 1 if first_only else longest, longest, p, call.causal, scale,
        attn_mask=packing.key_mask, relative_bias=call.relative_bias, return_lse=call.attentions is not None,
        window=_window(call, index), softcap=call.spec.softcap,
    )  # fmt: skip
    if call.attentions is None:
        return out
    out, lse = out
    lse = packing.unpack(lse.t(), fill=-float("inf")).transpose(1, 2)
    call.attentions[index] = _probabilities(
        packing.unpack(q).transpose(1, 2), packing.unpack(k).transpose(1, 2), lse, scale=scale,
        attn_mask=packing.mask[:, None, None], is_causal=call.causal, bias=call.bias,
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
    """(out (B, Sq, H, D), weights (B, H, Sq, Sk)): out is made of the weights, so that its gradient reaches them, which
    attribution methods read. mask, bias: as in ops.scaled_dot_product_attention."""
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
    # The scores here and those inside lse were rounded apart: make rows sum to one again.
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1.0)


def _cross_attention(w, x, states, call: StackCall, index, past_key_values) -> torch.Tensor:
    spec, packing, source = call.spec, call.packing, call.encoder_packing
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
        padding = _is_packed(packing) or _is_packed(source)
        if padding and lengths_known and cache is None and call.cross_attentions is None:
            return _packed_cross_attention(q, k, v, call, index, p)
        if _is_packed(source):
            k, v = source.unpack(k), source.unpack(v)  # type: ignore[union-attr]
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.cross_attention_cache.update(k, v, index)
            cache.is_updated[index] = True
    if _is_packed(packing):  # queries take their place again: few rows beside the encoder's
        q = packing.unpack(q)
    rows, length = q.shape[:2]
    if rows != k.shape[0]:  # rows that continue one prompt (beams) are queries of its one set of keys
        q = q.reshape(k.shape[0], -1, *heads)
    out = _padded_attention(
        q.transpose(1, 2), k, v, call.encoder_mask, call, False, p, call.cross_attentions, index,
        key_lengths=call.encoder_lengths,
    )  # fmt: skip
    return packing.pack(out.view(rows, length, out.shape[-1]))


def _packed_cross_attention(q, k, v, call: StackCall, index: int, p: float) -> torch.Tensor:
    """Neither side's padding is read: q (total, H, D) or (B, Sq, H, D), k, v (total, H, D) or (B, Se, H, D)."""
    shape, source = q.shape, call.encoder_packing
    (q, cu_q, longest_q), (k, cu_k, longest_k) = _sequences(q, call.packing), _sequences(k, source)
    v = _sequences(v, source)[0]
    out = ops.varlen_attention(
        q, k, v, cu_q, cu_k, longest_q, longest_k, p, False, call.spec.scale_of(index),
        attn_mask=None if source is None else source.key_mask,
    )  # fmt: skip
    return out.view(shape).flatten(-2)


def _sequences(t: torch.Tensor, packing: Packing | None) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(rows, where each sequence begins, the longest), packed or not. All documents in a row see its encoder states."""
    if packing is not None and packing.index is not None:
        if not packing.documents:
            return t, packing.cu_seqlens, packing.max_seqlen  # type: ignore[return-value]
        t = packing.unpack(t)
    batch, length = t.shape[:2]
    cu = torch.arange(batch + 1, dtype=torch.int32, device=t.device) * length
    return t.flatten(0, 1), cu, length


def _is_packed(packing: Packing | None) -> bool:
    return packing is not None and packing.index is not None


def _self_cache(past_key_values):
    return getattr(past_key_values, "self_attention_cache", past_key_values)
