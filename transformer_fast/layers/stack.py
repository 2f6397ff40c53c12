"""The layers of encoders and decoders: attention, feed-forward block and norms, on unpadded rows."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .. import ops
from ..backends.memory import keep_for_training
from ..ops._common import autocast_dtype
from ..ops.linear_int8 import Int8BlockWeights, int8_block
from .planning import StackCall
from .projection import add_norm, add_norm_sum, dropout_p, is_plain, is_rms_norm, linear, norm, norm_of
from .quantized import block_weights, is_int8
from .spec import LayerWeights, TransformerSpec
from .stack_attention import cross_attention, self_attention

__all__ = ["normed_input", "run_layers", "transformer_layer"]


def run_layers(
    layers: Iterable[nn.Module],
    rows: torch.Tensor,
    call: StackCall,
    *,
    first_only: bool = False,
    past_key_values: Any = None,
    keep_hidden: Any = (),
) -> torch.Tensor:
    """Call each layer, as a module (for hooks, checkpointing and sharding), on the unpadded rows.

    first_only: the last layer computes only the first position of each sequence, and the result is (batch, E).
    keep_hidden: the indices of the hidden states to store in call.hidden_states as (batch, length, E); 0 is the
    embedding.
    """
    layers = list(layers)
    keep_for_training(rows)
    for index, layer in enumerate(layers):
        if index in keep_hidden:
            call.hidden_states[index], rows = call.unpadding.show(rows)
        last = first_only and index == len(layers) - 1
        # A returned state must get the gradients of everything that reads it, so the next norm is not fused then.
        call.following = None if index + 1 in keep_hidden else _following(layers, index, call)
        # Positional arguments, because reentrant checkpointing differentiates only with respect to these.
        states = tuple(t for t in (call.encoder_states, call.distances) if t is not None)
        rows = layer(rows, call, index, last, *states, past_key_values=past_key_values)
    return rows if layers or not first_only else call.unpadding.first(rows)


def transformer_layer(
    w: LayerWeights,
    x: torch.Tensor,
    call: StackCall,
    index: int,
    first_only: bool = False,
    past_key_values: Any = None,
    encoder_states: torch.Tensor | None = None,
    distances: torch.Tensor | None = None,
) -> torch.Tensor:
    """x: (B, S, E) or unpadded (total, E) -> the same shape, or (B, E) with first_only. encoder_states, distances:
    those of `call`.

    Source: Vaswani et al., "Attention Is All You Need", 2017, section 3.1; Xiong et al., "On Layer Normalization in
    the Transformer Architecture", 2020, for norm_position "pre".
    """
    before = spread = call.unpadding.spread
    if spread is not None:  # checkpointing may run this again outside of context_parallel
        before = ops.parallel.set_current(spread)
    try:
        return _layer(w, x, call, index, first_only, past_key_values, encoder_states, distances)
    finally:
        if spread is not None:
            ops.parallel.set_current(before)


def _layer(w: LayerWeights, x, call: StackCall, index, first_only, past_key_values, encoder_states, distances):
    post = call.spec.norm_position == "post"
    normed = x if post else normed_input(w.attention_norm, x, call)
    block = _int8_block(w, x, call.spec) if encoder_states is None and is_int8(w.down) else None
    if call.disentangled is not None:
        sizes, scale = (call.spec.num_heads, call.spec.head_dim), call.spec.scale
        mixed = call.disentangled.attend(w, normed, distances, sizes, scale, call.attentions, index)  # type: ignore[arg-type]
        mixed = call.unpadding.first(mixed) if first_only else mixed
    else:
        mixed = self_attention(w, normed, call, index, first_only, past_key_values, block is not None)
    if block is not None:
        return int8_block(mixed, call.unpadding.first(x) if first_only else x, block)
    mixed = linear(w.attention_output, mixed)
    residual = call.unpadding.first(x) if first_only else x
    p, p_out = dropout_p(w.attention_output_dropout), dropout_p(w.output_dropout)
    if post:
        x = add_norm(w.attention_norm, mixed, residual, p)
        if encoder_states is not None:
            mixed = linear(_cross(w), cross_attention(w, x, encoder_states, call, index, past_key_values))
            x = add_norm(w.cross_norm, mixed, x, dropout_p(w.cross_output_dropout))  # type: ignore[arg-type]
        return _clamped(add_norm(w.output_norm, _feed_forward(w, x, call.spec), x, p_out), call.spec)
    if w.attention_after_norm is not None:
        mixed = norm(w.attention_after_norm, mixed)
    if encoder_states is not None:
        normed, residual = _sum_norm(_cross_norm(w), mixed, residual, p, call.spec)
        mixed = linear(_cross(w), cross_attention(w, normed, encoder_states, call, index, past_key_values))
        p = dropout_p(w.cross_output_dropout)
    if call.spec.parallel:
        if w.output_norm is not w.attention_norm:
            normed = norm(w.output_norm, residual)
        elif first_only:
            normed = call.unpadding.first(normed)
        inner = _feed_forward(w, normed, call.spec)
        return _last_sum(inner, residual + ops.dropout(mixed, p), p_out, call)
    normed, residual = _sum_norm(w.output_norm, mixed, residual, p, call.spec)
    inner = _feed_forward(w, normed, call.spec)
    if w.output_after_norm is not None:
        inner = norm(w.output_after_norm, inner)
    return _last_sum(inner, residual, p_out, call)


def normed_input(module: Any, x: torch.Tensor, call: StackCall) -> torch.Tensor:
    """norm(x), which the previous layer may have computed already."""
    ready, call.ready = call.ready, None
    return ready[2] if ready is not None and ready[0] is x and ready[1] is module else norm(module, x)


def _last_sum(inner, residual, p: float, call: StackCall) -> torch.Tensor:
    """residual + dropout(inner). If call.following is set, its norm is computed in the same pass."""
    if call.following is None:
        return _clamped(residual + ops.dropout(inner, p), call.spec)
    normed, total = _sum_norm(call.following, inner, residual, p, call.spec)
    call.ready = (total, call.following, normed)
    return total


def _following(layers: list[nn.Module], index: int, call: StackCall) -> nn.Module | None:
    """The first norm of the layer after `index`, if both layers are unmodified: a hook may read or change the state
    between layers, or gather a layer's weights. None under a compiler, which fuses sum and norm itself."""
    if call.spec.norm_position != "pre" or index + 1 >= len(layers) or torch.compiler.is_compiling():
        return None
    for layer in layers[index : index + 2]:
        if not (hasattr(type(layer), "slots") and is_plain(layer, type(layer))):
            return None
        if layer.training and getattr(layer, "gradient_checkpointing", False):
            return None
    module = layers[index + 1].slots().read(layers[index + 1]).attention_norm  # type: ignore[operator]
    return module if is_plain(module, nn.LayerNorm) or is_rms_norm(module) else None


def _int8_block(w: LayerWeights, x: torch.Tensor, spec: TransformerSpec) -> Int8BlockWeights | None:
    """The weights for running the layer after attention as one int8 op; None if it cannot be one."""
    dropouts = (w.attention_output_dropout, w.activation_dropout, w.output_dropout)
    if (
        (torch.is_grad_enabled() and x.requires_grad)
        or x.dtype == torch.float64
        or any(dropout_p(d) for d in dropouts)
        or spec.parallel
        or not (w.attention_after_norm is None and w.output_after_norm is None)
        or (spec.clamp_float16 and x.dtype == torch.float16)
    ):
        return None
    after, output = norm_of(w.attention_norm), norm_of(w.output_norm)
    if after is None or output is None or after[1] != output[1]:
        return None
    post = spec.norm_position == "post"
    return block_weights(w, spec, after[0] if post else None, output[0], output[1])


def _sum_norm(module, x, residual, p: float, spec: TransformerSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm(s), s) with s = residual + dropout(x), clamped if the spec says so."""
    if spec.clamp_float16 and x.dtype == residual.dtype == torch.float16:
        total = _clamped(residual + ops.dropout(x, p), spec)
        return norm(module, total), total
    return add_norm_sum(module, x, residual, p)  # type: ignore[return-value]


def _clamped(x: torch.Tensor, spec: TransformerSpec) -> torch.Tensor:
    if not spec.clamp_float16 or x.dtype != torch.float16:
        return x
    largest = torch.finfo(x.dtype).max
    bound = torch.where(x.isinf().any(), largest - 1000, largest)  # a tensor, so that nothing synchronises
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
    weight = getattr(w.down, "weight", None)  # T5 keeps it in float32 if the rest is float16
    if isinstance(weight, torch.Tensor) and weight.is_floating_point() and autocast_dtype(inner.device) is None:
        inner = inner.to(weight.dtype)
    return linear(w.down, inner)
