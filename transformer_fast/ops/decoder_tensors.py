"""What a decoding step reads: the tensors and options of a decoder, by their place in it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from .linear_int8 import Int8Weight

__all__ = ["DecoderLayerTensors", "DecoderTensors", "Norm", "Projection", "StepTensors"]


class Norm(NamedTuple):
    """A layer norm or RMS norm. weight, bias: (E,) or None."""

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float


class Projection(NamedTuple):
    """Linear maps of one input with concatenated outputs: weights (out_i, in), or (in, out_i) if transposed; biases
    (out_i,) or None. An Int8Weight is never copied, and its product is computed in int8."""

    weights: tuple[torch.Tensor | Int8Weight, ...]
    biases: tuple[torch.Tensor | None, ...]
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(sum of out_i, in)."""
        outs, inner = (1, 0) if self.transposed else (0, 1)
        return sum(w.shape[outs] for w in self.weights), self.weights[0].shape[inner]

    def parts(self) -> list[torch.Tensor | Int8Weight]:
        """The weights as (out_i, in): views if one of their strides is 1, else copies."""
        return [self._part(w) for w in self.weights]

    def _part(self, weight: torch.Tensor | Int8Weight) -> torch.Tensor | Int8Weight:
        if isinstance(weight, Int8Weight):
            return weight
        w = weight.detach().t() if self.transposed else weight.detach()
        return w if w.stride(-1) == 1 or w.stride(0) == 1 else w.contiguous()

    def read(self, panels: Iterator[torch.Tensor] | None, rows: bool = False) -> list[torch.Tensor]:
        """The memory that a step reads for each weight: the next of `panels`, or the weight itself if that is None.
        rows: the step can only read a weight itself in (out, in) layout."""
        found: list[torch.Tensor] = []
        for part in self.parts():
            if isinstance(part, Int8Weight):
                found.append(part.data)  # type: ignore[arg-type]
            elif panels is None:
                found.append(part.contiguous() if rows else part)
            else:
                found.append(next(panels))
        return found

    def tensors(self) -> list[torch.Tensor]:
        """The tensors that hold the weights."""
        return [w if isinstance(w, torch.Tensor) else w.data for w in self.weights]  # type: ignore[misc]

    def bias(self, index: int) -> torch.Tensor | None:
        b = self.biases[index]
        return None if b is None else b.detach().to(torch.float32).reshape(-1).contiguous()


@dataclass
class DecoderLayerTensors:
    """The tensors of one decoder layer.

    qkv: query, key and value projections; see DecoderTensors.qkv_by_head. scale, cross_scale: factors of the scores of
    self- and cross-attention. query_norm, key_norm: norms over each head, before the rotation. attention_after_norm,
    output_after_norm: norms of what a sublayer adds to the residual. window: the number of keys that a query attends
        to,
    including its own position; None for all. relative: the layer's own table of relative positions, see DecoderTensors.
    """

    attention_norm: Norm | None
    qkv: Projection
    attention_output: Projection
    output_norm: Norm | None
    up: Projection
    down: Projection
    scale: float
    gate: Projection | None = None
    cross_norm: Norm | None = None
    cross_query: Projection | None = None
    cross_output: Projection | None = None
    cross_scale: float = 1.0
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    attention_after_norm: Norm | None = None
    output_after_norm: Norm | None = None
    window: int | None = None
    relative: torch.Tensor | None = None

    @property
    def norms(self) -> tuple[Norm | None, ...]:
        return (
            self.attention_norm, self.cross_norm, self.output_norm, self.query_norm, self.key_norm,
            self.attention_after_norm, self.output_after_norm,
        )  # fmt: skip

    @property
    def projections(self) -> tuple[Projection | None, ...]:
        return (
            self.qkv, self.attention_output, self.cross_query, self.cross_output, self.up, self.gate, self.down,
        )  # fmt: skip


@dataclass
class DecoderTensors:
    """The tensors and options of a decoder: logits = head_scale * W_head f(x) + bias, with x = embedding_norm(
    embed_scale * token[id] + position[p]) and f the layers and the final norm.

    token: (tokens, E); position: (positions, E) or None; head: (V, E). longer_positions: a function of a number of rows
    that returns `position` with at least that many, for tables that grow. relative: T5's (buckets, H) table, or None; a
    layer may have its own. pre_norm: x + f(norm(x)), else norm(x + f(x)). rms: every norm is an RMS norm. parallel:
    both sublayers read the same x. qkv_by_head: qkv is one weight whose outputs are query, key and value of the first
    head, then of the second, and so on. key_heads: number of key and value heads; None for `heads`. softcap,
    logits_softcap: soft caps s tanh(x / s) of the scores and of the logits; 0 for none. rotary: a function of a number
    of positions that returns cos and sin, float32 (positions, R / 2).
    """

    layers: list[DecoderLayerTensors]
    heads: int
    head_dim: int
    token: torch.Tensor
    head: Projection
    activation: str
    pre_norm: bool
    rms: bool = False
    position: torch.Tensor | None = None
    embed_scale: float = 1.0
    embedding_norm: Norm | None = None
    final_norm: Norm | None = None
    head_scale: float = 1.0
    relative: torch.Tensor | None = None
    relative_max_distance: int = 128
    key_heads: int | None = None
    parallel: bool = False
    qkv_by_head: bool = False
    softcap: float = 0.0
    logits_softcap: float = 0.0
    rotary: Callable[[int], tuple[torch.Tensor, torch.Tensor]] | None = None
    rotary_interleaved: bool = False
    longer_positions: Callable[[int], torch.Tensor] | None = None

    def projections(self) -> list[Projection]:
        found = [p for layer in self.layers for p in layer.projections] + [self.head]
        return [p for p in found if p is not None]

    def weights(self) -> list[torch.Tensor]:
        """The floating-point weights of all projections, which are the ones that DecoderCopies copies."""
        return [w.detach() for p in self.projections() for w in p.weights if isinstance(w, torch.Tensor)]

    def sources(self) -> list[torch.Tensor]:
        """Every tensor that the computation reads."""
        norms = [n for layer in self.layers for n in layer.norms] + [self.embedding_norm, self.final_norm]
        found = [t for n in norms if n is not None for t in (n.weight, n.bias)]
        found += [t for p in self.projections() for t in (*p.tensors(), *p.biases)]
        found += [layer.relative for layer in self.layers]
        return [t for t in (*found, self.token, self.position, self.relative) if t is not None]


class StepTensors(Protocol):
    """The tensors of a decoding step; the interface that all kinds of decoders share."""

    token: torch.Tensor

    def projections(self) -> list[Projection]: ...

    def weights(self) -> list[torch.Tensor]: ...

    def sources(self) -> list[torch.Tensor]: ...
