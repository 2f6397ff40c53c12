"""Plans one forward pass from its masks: which positions are computed and how they are masked. All layers share it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import ops
from .disentangled import Disentangled
from .spec import LayerWeights, TransformerSpec
from .unpadding import (
    Unpadding,
    padding_is_computed,
    plan_documents,
    plan_unpadding,
    positions_kept,
    spread_in_use,
)

__all__ = ["BeyondFastPath", "Rotary", "StackCall", "plan_call", "self_cache"]

_BLIND = "a position attends to no key, for which eager attention takes the mean of all values"


class BeyondFastPath(Exception):
    """A call whose result differs in transformers' own code, which therefore runs. Its text is the reason."""


class LongMask(BeyondFastPath, ValueError):
    """A padding mask with more columns than positions. Most models of transformers ignore one without padding; where
    theirs fails, ours does so with this error."""


class Rotary(NamedTuple):
    """Rotary tables. cos, sin: float32 (rows, R / 2); positions: as the argument of ops.rotary_embedding."""

    cos: torch.Tensor
    sin: torch.Tensor
    positions: torch.Tensor | None

    @classmethod
    def of(cls, unpadding: Unpadding, cos: torch.Tensor, sin: torch.Tensor) -> "Rotary":
        """Make a Rotary from cos and sin (B or 1, S, R / 2) of every position of the batch."""
        own, index = cos.shape[0] > 1, unpadding.index
        if index is not None:
            positions = index if own else index % unpadding.length
        elif own:
            positions = torch.arange(unpadding.batch * unpadding.length, device=cos.device).view(unpadding.batch, -1)
        else:
            positions = None
        return cls(cos.flatten(0, 1), sin.flatten(0, 1), positions)

    def __call__(self, x: torch.Tensor, interleaved: bool) -> torch.Tensor:
        """x: (B, S, H, D) or (total, H, D)."""
        return ops.rotary_embedding(x, self.cos, self.sin, self.positions, interleaved=interleaved)


@dataclass
class StackCall:
    """The state of one forward pass that all layers share.

    unpadding: which positions are computed. mask: (B or 1, H or 1, Sq or 1, Sk), bool or additive float, or None; if
    unpadding drops positions, its key_mask is used instead. causal, bottom_right: as in
    ops.scaled_dot_product_attention.

    relative_bias: added to the scores of self-attention; a layer may have its own table, and the shared table may be
        set
    later by share_table. bias: the same bias as a matrix (1, H, Sq, Sk), computed only if the attention weights are
    returned or a cache has more positions than are in use. bias_of: the arguments of RelativeBias.matrix for it.
    table_is_cut: the table needs a gradient, but share_table's copy of it has none.

    encoder_states: (B, Se, E), or the rows of encoder_unpadding. encoder_mask: (B, 1, 1, Se) bool or full 4-D, for
    cross-attention. encoder_lengths: (B,), replaces encoder_mask if padding is on the right. attentions,
    cross_attentions: {layer: (B, H, Sq, Sk)}, filled if not None.

    windowed: False if a complete 4-D mask replaces spec.windows. rotary: rotary tables, or one per layer if layers
    differ. disentangled: replaces self-attention; distances: the table it reads. following: the norm that reads the
    layer's result; it is fused with the layer's last residual sum. ready: (that sum, the norm, its result).
    """

    spec: TransformerSpec
    unpadding: Unpadding
    windowed: bool = True
    rotary: "Rotary | Sequence[Rotary] | None" = None
    mask: torch.Tensor | None = None
    causal: bool = False
    bottom_right: bool = False
    relative_bias: ops.RelativeBias | None = None
    bias: torch.Tensor | None = None
    bias_of: tuple[torch.Tensor, int] | None = None
    disentangled: Disentangled | None = None
    distances: torch.Tensor | None = None
    encoder_states: torch.Tensor | None = None
    encoder_unpadding: Unpadding | None = None
    encoder_mask: torch.Tensor | None = None
    encoder_lengths: torch.Tensor | None = None
    attentions: dict[int, torch.Tensor] | None = None
    cross_attentions: dict[int, torch.Tensor] | None = None
    hidden_states: dict[int, torch.Tensor] = field(default_factory=dict)
    table_is_cut: bool = False
    following: nn.Module | None = None
    ready: tuple[torch.Tensor, nn.Module, torch.Tensor] | None = None

    def relative_of(self, w: LayerWeights) -> tuple[ops.RelativeBias | None, torch.Tensor | None]:
        """relative_bias and bias for the layer with weights w. relative_bias is None if the matrix is used instead."""
        relative, bias = self.relative_bias, self.bias
        if relative is not None and w.relative_bias is not None:
            relative = relative._replace(table=w.relative_bias.weight)  # type: ignore[arg-type]
            bias = None if self.bias_of is None else relative.matrix(*self.bias_of)
        elif self.table_is_cut and torch.is_grad_enabled():
            raise RuntimeError(
                "gradient checkpointing: wanted use_reentrant=False for T5 under FSDP2, got True, which loses the "
                "gradient of the table of relative positions"
            )
        return (None if bias is not None and self.unpadding.index is None else relative), bias

    def share_table(self, table: torch.Tensor) -> None:
        """Set the table of relative_bias. FSDP2 gathers the table only in the layer that owns it, so the other layers
        read a copy."""
        self.table_is_cut = table.requires_grad and not torch.is_grad_enabled()
        self.relative_bias = self.relative_bias._replace(table=table.clone())  # type: ignore[union-attr]
        if self.bias_of is not None:
            self.bias = self.relative_bias.matrix(*self.bias_of)

    def rotary_of(self, index: int) -> "Rotary | None":
        return self.rotary if self.rotary is None or isinstance(self.rotary, Rotary) else self.rotary[index]


# FSDP2 and accelerate search dataclasses for tensors and would give each layer a copy, but the layers share this
# object.
del StackCall.__dataclass_fields__


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
    encoder_unpadding: Unpadding | None = None,
    relative_bias: ops.RelativeBias | None = None,
    documents: torch.Tensor | None = None,
    read: torch.Tensor | None = None,
    read_first: bool = False,
    attentions: bool = False,
    refuses_blind: bool = False,
) -> StackCall:
    """Read the masks once and decide which positions are computed and how they are masked.

    attention_mask: None, (B, S) with nonzero for tokens ((B, past + S) with a cache), (B, Sq, Sk), or 4-D; masks with
    more than 2 dimensions are complete, and spec.causal adds nothing to them. encoder_unpadding: if given,
    encoder_states are its rows, else (B, Se, E). relative_bias: distances include padding between two tokens.
    documents: (B, S), the document of each position, which attends only to that document; only without attention_mask
    and cache. read, read_first: see plan_unpadding. refuses_blind: raise BeyondFastPath for queries that are read and
    attend to no key by the 2-D masks, unless these cannot be read (see plan_unpadding).
    """
    spread = spread_in_use()
    call = StackCall(
        spec, Unpadding(batch, length, spread=spread), causal=spec.causal, relative_bias=relative_bias,
        encoder_states=encoder_states,
    )  # fmt: skip
    if spread is not None:
        _check_spread(past_key_values, attentions)
    if attentions:
        call.attentions, call.cross_attentions = {}, {}
    if encoder_states is not None:
        _plan_cross(call, encoder_mask, encoder_unpadding, past_key_values, refuses_blind)
    if attention_mask is not None and attention_mask.dim() > 2:
        call.mask = _expand(attention_mask, "attention_mask", batch, None, device)
        call.causal = call.windowed = False
    elif past_key_values is not None:
        padding_free = encoder_mask is None or encoder_mask.dim() == 2
        _plan_cached(
            call, attention_mask, length, device, past_key_values, (read, read_first) if padding_free else None,
            refuses_blind,
        )  # fmt: skip
    elif attention_mask is not None:
        mask = _expand(attention_mask, "attention_mask", batch, length, device)[:, 0, 0]
        if encoder_mask is not None and encoder_mask.dim() > 2:
            call.mask = mask[:, None, None]
        else:
            _drop_padding(call, mask, read, read_first, refuses_blind)
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
            "past_key_values: wanted an empty cache under context_parallel; generate outside of context_parallel"
        )


def _plan_documents(call: StackCall, documents: torch.Tensor) -> None:
    if not torch.compiler.is_compiling() and ops.concrete(documents) and call.attentions is None:
        call.unpadding = plan_documents(documents)
        return
    together = documents[:, :, None] == documents[:, None]
    call.mask = (together.tril() if call.causal else together)[:, None]
    call.causal = False


def _drop_padding(
    call: StackCall, mask: torch.Tensor, read: torch.Tensor | None, read_first: bool, refuses_blind: bool
) -> None:
    if call.unpadding.spread is not None:  # the parts of all processes must have the same length
        call.mask = mask[:, None, None]
        return
    placed = call.relative_bias is not None or call.spec.disentangled or any(call.spec.windows)
    if placed:  # keep padding between tokens, as distances count it
        read = _span(positions_kept(mask, read, read_first))
    if padding_is_computed():
        read = torch.ones_like(mask)
    blind = None
    if refuses_blind and (read is not None or read_first):
        blind = (positions_kept(mask, read, read_first) & ~_seen(call.spec, mask, mask.shape[1])).any()
    call.unpadding = plan_unpadding(mask, read, read_first, blind)
    if call.unpadding.blind:
        raise BeyondFastPath(_BLIND)
    call.mask = call.unpadding.key_mask


def _seen(spec: TransformerSpec, mask: torch.Tensor, queries: int) -> torch.Tensor:
    """(B, queries or 1) bool: whether the query attends to a key in every layer. mask: (B, keys) bool; the queries are
    at the last positions."""
    if not spec.causal and not spec.windows:
        return mask.any(1, keepdim=True)
    upto = nn.functional.pad(mask.cumsum(1), (1, 0))
    places = torch.arange(mask.shape[1] - queries, mask.shape[1], device=mask.device)
    seen = mask.new_ones(mask.shape[0], queries)
    for window in set(spec.windows or (None,)):
        begin = torch.zeros_like(places) if window is None else (places - window + 1).clamp(min=0)
        end = places + (1 if spec.causal else mask.shape[1] if window is None else window)
        seen &= upto[:, end.clamp(max=mask.shape[1])] > upto[:, begin]
    return seen


def _span(mask: torch.Tensor) -> torch.Tensor:
    """(B, S): True from the first True of each row to its last."""
    return (mask.cumsum(1) > 0) & (mask.flip(1).cumsum(1).flip(1) > 0)


def _plan_relative(call: StackCall, length: int, device, past_key_values) -> None:
    seen, keys = 0, length
    if past_key_values is not None:
        cache = self_cache(past_key_values)
        seen, keys = cache.get_seq_length(), cache.get_mask_sizes(length, 0)[0]
    aligned = isinstance(seen, int) and keys == seen + length
    if aligned and past_key_values is not None:
        call.bottom_right = True
    if call.attentions is None and aligned:
        return
    call.bias_of = (torch.arange(length, device=device) + seen, keys)
    if call.relative_bias.table is not None:  # type: ignore[union-attr]
        call.bias = call.relative_bias.matrix(*call.bias_of)  # type: ignore[union-attr]


def _plan_cross(call: StackCall, mask, unpadding: Unpadding | None, past_key_values, refuses_blind: bool) -> None:
    states: Any = call.encoder_states
    if call.unpadding.spread is not None:  # padding is not dropped under context_parallel
        unpadding = None
    if unpadding is None and mask is not None:
        mask = _expand(mask, "encoder_attention_mask", states.shape[0], states.shape[1], states.device)
        if mask.dtype != torch.bool or mask.shape[1:3] != (1, 1) or call.unpadding.spread is not None:
            call.encoder_mask = mask
            return
        if _all_stored(past_key_values):  # keys and values come from the cache, not from the states
            if refuses_blind and ops.concrete(mask) and not bool(mask.any(-1).all()):
                raise BeyondFastPath(_BLIND)
            call.encoder_mask = mask
            _shorten(call)
            return
        unpadding = plan_unpadding(mask[:, 0, 0])
        call.encoder_states = unpadding.unpad(states)
    if refuses_blind and unpadding is not None and unpadding.hollow:
        raise BeyondFastPath(_BLIND)
    call.encoder_unpadding = unpadding
    if unpadding is not None and unpadding.mask is not None:
        call.encoder_mask = unpadding.mask[:, None, None]
        if past_key_values is not None:
            _shorten(call)


def _all_stored(past_key_values) -> bool:
    stored: Any = getattr(past_key_values, "is_updated", None)
    return bool(stored) and all(stored.values())


def _shorten(call: StackCall) -> None:
    """Replace the encoder's mask by lengths if its padding is on the right. Only on the CPU, where reading is free."""
    mask: Any = call.encoder_mask
    if mask.device.type != "cpu" or torch.compiler.is_compiling() or not ops.concrete(mask):
        return
    rows = mask[:, 0, 0]
    lengths = rows.sum(1)
    if torch.equal(rows, torch.arange(rows.shape[1]) < lengths[:, None]):
        call.encoder_mask, call.encoder_lengths = None, lengths


def _expand(mask: torch.Tensor, name: str, batch: int, length: int | None, device: torch.device) -> torch.Tensor:
    """A user's mask as a 4-D mask; a 2-D mask becomes bool."""
    mask = mask.to(device)
    if mask.dim() == 2:
        if mask.shape[0] not in (1, batch) or mask.shape[1] != length:
            longer = mask.shape[0] in (1, batch) and length is not None and mask.shape[1] > length
            kind = LongMask if longer else ValueError
            raise kind(f"{name}: wanted shape (batch, length) = {(batch, length)}, got {tuple(mask.shape)}")
        return (mask if mask.dtype == torch.bool else mask != 0).expand(batch, length)[:, None, None]
    if mask.dim() not in (3, 4):
        raise ValueError(f"{name}: wanted 2, 3 or 4 dimensions, got shape {tuple(mask.shape)}")
    mask = mask if mask.dtype == torch.bool or mask.is_floating_point() else mask != 0
    return mask[:, None] if mask.dim() == 3 else mask


def _plan_cached(
    call: StackCall, attention_mask, length: int, device, past_key_values, read: tuple | None, refuses_blind: bool
) -> None:
    cache = self_cache(past_key_values)
    seen = cache.get_seq_length()
    # Layers with a window keep only the last keys. Each of them cuts the mask to the keys that it has.
    keys = seen + length if call.spec.windows else cache.get_mask_sizes(length, 0)[0]
    if attention_mask is not None:
        if attention_mask.shape[0] == 1:
            attention_mask = attention_mask.expand(call.unpadding.batch, -1)
        batch, given = attention_mask.shape
        if batch != call.unpadding.batch or (isinstance(seen, int) and given != seen + length and given != keys):
            wanted = (call.unpadding.batch, keys)
            raise ValueError(
                f"attention_mask: wanted shape (batch, past + length) = {wanted}, got {tuple(attention_mask.shape)}"
            )
        mask = _expand(attention_mask, "attention_mask", batch, given, device)
        if given < keys:  # a static cache has more positions than are in use
            mask = nn.functional.pad(mask, (0, keys - given))
        visible = not torch.compiler.is_compiling() and ops.concrete(mask)
        if visible and call.causal and read is not None and isinstance(seen, int) and not seen and keys == length:
            # The cache is empty, so padding is dropped as without one.
            _drop_padding(call, mask[:, 0, 0], read[0], read[1], refuses_blind)
            return
        readable = visible and isinstance(seen, int) and length
        if refuses_blind and readable and not bool(_seen(call.spec, mask[:, 0, 0, : seen + length], length).all()):
            raise BeyondFastPath(_BLIND)
        # Reading the mask is free on the CPU, and attention without a mask is faster.
        if device.type != "cpu" or not visible or not bool(mask.all()):
            call.mask = mask
    if not call.causal:
        return
    call.bottom_right = isinstance(seen, int) and keys == seen + length  # windows also end at the query's position
    if call.bottom_right and call.attentions is None:
        call.causal = length > 1 or call.unpadding.spread is not None
        return
    seen_by = torch.arange(keys, device=device) <= (torch.arange(length, device=device) + seen)[:, None]
    call.mask = seen_by[None, None] if call.mask is None else call.mask & seen_by
    call.causal = False


def self_cache(past_key_values):
    return getattr(past_key_values, "self_attention_cache", past_key_values)
