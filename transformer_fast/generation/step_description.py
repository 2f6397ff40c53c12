"""A description of a decoder, from which steppers compute a decoding step without the model's forward.

Models return it from a method `step_description()`. StepDescription.why_not says why a model cannot be run so.
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
from ..ops.decoder_tensors import DecoderLayerTensors, DecoderTensors, Norm
from .step_modules import is_hooked, is_known, projection_of, weight_of, why_not_tensors

__all__ = ["StepDescription"]


@dataclass
class StepDescription:
    """A decoder: its modules, and the options that are not in the modules.

    root: the module tree that the native step bypasses, so that hooks in it would not run.
    layers: the weights of the layers, in order; with cross-attention the slots cross_query and cross_output are set,
        and cross_key and cross_value or cross_key_value. spec: the spec of all layers.
    token: the embedding module, whose rows are multiplied by embed_scale. position: a module whose `weight` has one row
        per position, the first at row position_offset (BART: 2). If it has a method `cover(rows)`, which makes the
        table longer, the number of positions is not limited. position_padding: a padding token, whose position row is
        the row with the token's own number.
    head: logits = head_scale * W x + b + head_bias with the module's W and b. head_bias: V values in any shape.
    relative_bias: T5's table (buckets, heads) as a module, for all layers without their own table;
        relative_max_distance: its largest distance.
    rotary: a function of a number of positions that returns cos and sin, float32 (positions, R / 2).
    logits_softcap: logits become logits_softcap * tanh(logits / logits_softcap); 0 for none.
    refused: why no step other than the forward may be used; '' if one may.
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
        """The rows of the position table for `tokens`: those in `following`, except for padding tokens."""
        padding = self.position_padding
        return following if padding is None else torch.where(tokens == padding, padding, following)

    @property
    def most_positions(self) -> int | None:
        """The number of positions with embeddings; None for no limit."""
        if self.position is None or hasattr(self.position, "cover"):
            return None
        return self.position.weight.shape[0] - self.position_offset

    def _longer_positions(self, rows: int) -> torch.Tensor:
        self.position.cover(rows)
        return self.position.weight

    def why_not(self) -> str:
        """'' if the native step computes the same as the modules, else the reason why not."""
        return native.load() or self.why_not_modules() or self._why_not_tensors()

    def why_not_modules(self) -> str:
        """'' if the modules compute exactly what this description says, else the reason why not."""
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
                return "only one of the up and gate projections is in int8"
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
            return "the embeddings have different dtypes"
        return ""

    def _norms(self) -> list[nn.Module]:
        found = [
            n for w in self.layers for n in (w.attention_norm, w.cross_norm, w.output_norm, w.query_norm, w.key_norm,
                                             w.attention_after_norm, w.output_after_norm)
        ]  # fmt: skip
        return [n for n in (*found, self.embedding_norm, self.final_norm) if n is not None]

    def tensors(self) -> DecoderTensors:
        """The current weights."""
        spec, head = self.spec, projection_of(self.head)
        if self.head_bias is not None:
            own, more = head.biases[0], self.head_bias
            head = head._replace(biases=(more if own is None else own.view(-1) + more.view(-1),))
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
