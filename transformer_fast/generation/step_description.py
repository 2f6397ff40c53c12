"""What a decoder is made of, said once by its family for every stepper that computes its step without its forward.

A model has a method `step_description()`. What a step cannot be made of has a reason: see StepDescription.why_not.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..backends import native
from ..layers.projection import is_plain, is_rms_norm
from ..layers.quantized import is_int8
from ..layers.spec import LayerWeights, TransformerSpec
from ..ops.activation import ACTIVATIONS
from ..ops.decoder_step import DecoderLayerTensors, DecoderTensors, Norm
from .step_modules import is_hooked, is_known, projection_of, weight_of, why_not_tensors

__all__ = ["StepDescription"]


@dataclass
class StepDescription:
    """A decoder for generation: its modules and what is not in them.

    root: the module whose tree is left out by the native step: hooks in it would not run.
    layers: in order; where there is cross-attention, with the slots cross_query, cross_output, and cross_key and
        cross_value or cross_key_value. spec: of all layers.
    token: the embedding table's module, times embed_scale; position: a module whose `weight` has one row per position,
        the first at position_offset (BART: 2). With a method `cover` (a number of rows) it grows, and no position
        is the last. position_padding: a token that has no position but the row of its own number.
    head: logits = head_scale * W x + head_bias (or the module's own bias). head_bias: V values in any shape.
    relative_bias: T5's table (buckets, heads) as a module, of all layers but those with one in a slot of their own;
        relative_max_distance: of its buckets.
    rotary: a function of a number of positions: cos and sin, float32 (positions, R / 2), of rotary embedding.
    logits_softcap: logits become logits_softcap * tanh(logits / logits_softcap); 0 for none.
    refused: why no step may be made of it; '' where one may.
    """

    root: nn.Module
    layers: Sequence[LayerWeights]
    spec: TransformerSpec
    token: Any
    head: Any
    position: Any = None
    position_offset: int = 0
    position_padding: int | None = None
    embed_scale: float = 1.0
    embedding_norm: nn.Module | None = None
    final_norm: nn.Module | None = None
    head_bias: torch.Tensor | None = None
    head_scale: float = 1.0
    relative_bias: Any = None
    relative_max_distance: int = 128
    rotary: Callable[[int], tuple[torch.Tensor, torch.Tensor]] | None = None
    logits_softcap: float = 0.0
    refused: str = ""

    @property
    def has_cross_attention(self) -> bool:
        return any(w.cross_query is not None for w in self.layers)

    def positions(self, tokens: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
        """The rows of the table for `tokens`, where `following` are those of tokens that have a position."""
        padding = self.position_padding
        return following if padding is None else torch.where(tokens == padding, padding, following)

    @property
    def most_positions(self) -> int | None:
        """How many positions there are embeddings for; None: any number."""
        if self.position is None or hasattr(self.position, "cover"):
            return None
        return self.position.weight.shape[0] - self.position_offset

    def _longer_positions(self, rows: int) -> torch.Tensor:
        self.position.cover(rows)
        return self.position.weight

    def why_not(self) -> str:
        """'' when the native step computes what the modules would, else the reason why not."""
        return native.load() or self.why_not_modules() or self._why_not_tensors()

    def why_not_modules(self) -> str:
        """'' when the modules compute what this description says, else the reason why not."""
        if self.refused:
            return self.refused
        if not self.layers:
            return "there are no layers"
        for name, module in self.root.named_modules():
            if is_hooked(module):
                return f"{name or type(module).__name__} has hooks or a forward of its own"
        if self.root.training:
            return "the model is in training mode"
        if self.spec.activation not in ACTIVATIONS:
            return f"there is no kernel for the activation {self.spec.activation!r}"
        if self.spec.head_dim > 256:
            return f"head dim {self.spec.head_dim} is over 256"
        for w in self.layers:
            if (w.cross_query is None) != (self.layers[0].cross_query is None):
                return "some layers have cross-attention and some do not"
            for slot in ("query", "key", "value", "qkv", "attention_output", "up", "gate", "down", "cross_query",
                         "cross_output"):  # fmt: skip
                module = getattr(w, slot)
                if module is not None and weight_of(module) is None:
                    return f"{slot} is a {type(module).__name__}, not a plain linear layer"
            if w.relative_bias is not None and not is_known(w.relative_bias, nn.Embedding):
                return f"relative_bias is a {type(w.relative_bias).__name__}, not a plain embedding"
            if w.gate is not None and is_int8(w.gate) != is_int8(w.up):
                return "of the up and gate projections one is in int8 and the other is not"
        kinds = {_norm_kind(n) for n in self._norms()}
        if None in kinds or len(kinds) > 1:
            return "its norms are not all layer norms or all rms norms"
        if weight_of(self.head) is None:
            return f"the head is a {type(self.head).__name__}, not a plain linear layer"
        for name in ("token", "position", "relative_bias"):
            module = getattr(self, name)
            if module is not None and not is_known(module, nn.Embedding):
                return f"{name} is a {type(module).__name__}, not a plain embedding"
        return ""

    def _why_not_tensors(self) -> str:
        if reason := why_not_tensors(self.tensors()):
            return reason
        if self.position is not None and self.position.weight.dtype != self.token.weight.dtype:
            return "the embeddings are of two dtypes"
        return ""

    def _norms(self) -> list[nn.Module]:
        found = [
            n for w in self.layers for n in (w.attention_norm, w.cross_norm, w.output_norm, w.query_norm, w.key_norm,
                                             w.attention_after_norm, w.output_after_norm)
        ]  # fmt: skip
        return [n for n in (*found, self.embedding_norm, self.final_norm) if n is not None]

    def tensors(self) -> DecoderTensors:
        """The weights as they are now."""
        spec, head = self.spec, projection_of(self.head)
        if self.head_bias is not None:
            head = head._replace(biases=(self.head_bias,))
        return DecoderTensors(
            [self._layer(w, i) for i, w in enumerate(self.layers)], spec.num_heads, spec.head_dim, self.token.weight,
            head, str(spec.activation), spec.norm_position == "pre", _norm_kind(self._norms()[0]) == "rms",
            None if self.position is None else self.position.weight, self.embed_scale, _norm(self.embedding_norm),
            _norm(self.final_norm), self.head_scale,
            None if self.relative_bias is None else self.relative_bias.weight, self.relative_max_distance,
            key_heads=spec.heads_of_keys, parallel=spec.parallel, qkv_by_head=spec.qkv_by_head,
            softcap=spec.softcap, logits_softcap=self.logits_softcap, rotary=self.rotary,
            rotary_interleaved=spec.rotary_interleaved,
            longer_positions=self._longer_positions if hasattr(self.position, "cover") else None,
        )  # fmt: skip

    def _layer(self, w: LayerWeights, index: int) -> DecoderLayerTensors:
        scale = self.spec.scale_of(index)
        scale = self.spec.head_dim**-0.5 if scale is None else scale
        return DecoderLayerTensors(
            _norm(w.attention_norm), projection_of(*([w.query, w.key, w.value] if w.qkv is None else [w.qkv])),
            projection_of(w.attention_output), _norm(w.output_norm), projection_of(w.up), projection_of(w.down), scale,
            None if w.gate is None else projection_of(w.gate), _norm(w.cross_norm),
            None if w.cross_query is None else projection_of(w.cross_query),
            None if w.cross_output is None else projection_of(w.cross_output), scale,
            _norm(w.query_norm), _norm(w.key_norm), _norm(w.attention_after_norm), _norm(w.output_after_norm),
            self.spec.window_of(index), None if w.relative_bias is None else w.relative_bias.weight,  # type: ignore[arg-type]
        )  # fmt: skip


def _norm_kind(module: Any) -> str | None:
    if is_plain(module, nn.LayerNorm):
        return "layer"
    return "rms" if is_rms_norm(module) else None


def _norm(module: Any) -> Norm | None:
    if module is None:
        return None
    if hasattr(module, "variance_epsilon"):
        return Norm(module.weight, None, module.variance_epsilon)
    if getattr(module, "adds_one", False):
        return Norm(1.0 + module.weight.float(), None, module.eps)
    eps = torch.finfo(torch.float32).eps if module.eps is None else module.eps
    return Norm(module.weight, getattr(module, "bias", None), eps)
