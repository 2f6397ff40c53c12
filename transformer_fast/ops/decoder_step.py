"""One decoding step as one native call: a token a row through every layer of a decoder, over caches written in place.

No autograd and no fake kernel: what can be traced or differentiated is the model's own forward. This is for inference
on the CPU, where a step of few rows is one pass over the weights and everything beside that pass is loss.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

from ..backends import memory, native
from ..backends.contents import Contents, FileMappings
from ..backends.eager import relative_buckets
from .activation import ACTIVATIONS
from .linear_int8 import Int8Weight
from .linear_panel import _PANEL, STORAGES, PanelWeight, panel_rows

__all__ = [
    "DecoderCache",
    "DecoderCopies",
    "DecoderLayerTensors",
    "DecoderTensors",
    "DecoderWeights",
    "Norm",
    "Projection",
    "StepTensors",
]

_ops = torch.ops.transformer_fast
_PIECE = 64 * _PANEL  # rows of a weight that are copied at once


class Norm(NamedTuple):
    """weight, bias: (E,) or None."""

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float


class Projection(NamedTuple):
    """Linear maps of one input side by side: weights (out_i, in), or (in, out_i) when transposed; biases (out_i,).
    An Int8Weight is read as it is, and makes the arithmetic int8."""

    weights: tuple[torch.Tensor | Int8Weight, ...]
    biases: tuple[torch.Tensor | None, ...]
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the whole."""
        outs, inner = (1, 0) if self.transposed else (0, 1)
        return sum(w.shape[outs] for w in self.weights), self.weights[0].shape[inner]

    def parts(self) -> list[torch.Tensor | Int8Weight]:
        """The weights (out_i, in), where they lie if they have a stride 1."""
        return [self._part(w) for w in self.weights]

    def _part(self, weight: torch.Tensor | Int8Weight) -> torch.Tensor | Int8Weight:
        if isinstance(weight, Int8Weight):
            return weight
        w = weight.detach().t() if self.transposed else weight.detach()
        return w if w.stride(-1) == 1 or w.stride(0) == 1 else w.contiguous()

    def read(self, panels: Iterator[torch.Tensor] | None, rows: bool = False) -> list[torch.Tensor]:
        """What a step reads of each weight: the next of the copies' panels, or where it lies; rows: as (out, in)."""
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
        """What the weights lie in."""
        return [w if isinstance(w, torch.Tensor) else w.data for w in self.weights]  # type: ignore[misc]

    def bias(self, index: int) -> torch.Tensor | None:
        b = self.biases[index]
        return None if b is None else b.detach().to(torch.float32).reshape(-1).contiguous()


@dataclass
class DecoderLayerTensors:
    """qkv: queries, keys and values side by side, heads inside. scale, cross_scale: of the scores.

    query_norm, key_norm: of each head, before rotation. attention_after_norm, output_after_norm: of what a sublayer
    adds to the residual. window: keys that a query sees, its own too; None for all. relative: the layer's own table of
    relative positions, see DecoderTensors.
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
    """The arithmetic of a decoder: logits = head_scale * W_head f(x) + bias with x = embedding_norm(embed_scale *
    token[id] + position[p]), f the layers and the final norm.

    token: (tokens, E); position: (positions, E) or None; head: (V, E). longer_positions: a function that gives position
    with at least so many rows, where it grows. relative: T5's (buckets, H) table, or None; a layer may have its own.
    pre_norm: x + f(norm(x)), else norm(x + f(x)). rms: of every norm. parallel: both sublayers read the same x.
    qkv_by_head: the outputs of a layer's qkv are each head's query, key and value in turn, in one weight.
    key_heads: heads of keys and values, `heads` when None. softcap: of the scores, logits_softcap: of the logits
    (s tanh(x / s)); 0 for none. rotary: a function of a number of positions: cos and sin, float32 (positions, R / 2).
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
        """Of all projections, those in floating point: what is worth a copy."""
        return [w.detach() for p in self.projections() for w in p.weights if isinstance(w, torch.Tensor)]

    def sources(self) -> list[torch.Tensor]:
        """Every tensor that the computation reads."""
        norms = [n for layer in self.layers for n in layer.norms] + [self.embedding_norm, self.final_norm]
        found = [t for n in norms if n is not None for t in (n.weight, n.bias)]
        found += [t for p in self.projections() for t in (*p.tensors(), *p.biases)]
        found += [layer.relative for layer in self.layers]
        return [t for t in (*found, self.token, self.position, self.relative) if t is not None]


class StepTensors(Protocol):
    """What a decoding step computes with: of every kind of decoder."""

    token: torch.Tensor

    def projections(self) -> list[Projection]: ...

    def weights(self) -> list[torch.Tensor]: ...

    def sources(self) -> list[torch.Tensor]: ...


class DecoderCopies:
    """Copies of a decoder's weights in the layout for few rows, of all but the embedding tables.

    storage: torch.float32, torch.bfloat16 or torch.int8 (see to_panels); None for the weights' own dtype. Weights
    that mirror a checkpoint's file give their memory back for their copies, else it is as much again. Copies do not
    follow later changes of the weights: ask match and make them again when that says False.
    """

    def __init__(self, tensors: StepTensors, storage: torch.dtype | None = None):
        if reason := native.load():
            raise RuntimeError(reason)
        if storage is None:
            storage = torch.bfloat16 if tensors.token.dtype == torch.bfloat16 else torch.float32
        elif storage not in STORAGES:
            raise TypeError(f"storage: wanted torch.float32, torch.bfloat16, torch.int8 or None, got {storage}")
        self.storage = storage
        parts = [part for p in tensors.projections() for part in p.parts() if isinstance(part, torch.Tensor)]
        sizes = [_panels(part) * panel_rows(part.shape[1], storage) * _PANEL for part in parts]
        # One piece of memory, so that nearly all of it lies in large pages: streaming through small ones takes up to
        # half as long again.
        arena = memory.empty((sum(sizes),), storage, torch.device("cpu"))
        self.bytes = arena.nbytes
        self.panels: list[torch.Tensor] = []  # of each weight
        self._contents, mappings = Contents(), FileMappings()
        for weight, part, piece in zip(tensors.weights(), parts, arena.split(sizes)):
            self._contents.note([weight], mappings)
            self.panels.append(piece.view(-1, panel_rows(part.shape[1], storage), _PANEL))
            _lay_out(part, self.panels[-1], mappings)

    def match(self, tensors: StepTensors) -> bool:
        """True when copies of the weights as they are now would be the same: see backends.contents."""
        return self._contents.same(tensors.weights())


def _lay_out(weight: torch.Tensor, panels: torch.Tensor, mappings: FileMappings) -> None:
    # Piece by piece, so that there are never two of all of them.
    step = weight.shape[0] if weight.stride(1) != 1 else _PIECE
    for begin in range(0, weight.shape[0], step):
        piece = weight[begin : begin + step]
        _ops.cpu_to_panels.default(piece, panels[begin // _PANEL :][: _panels(piece)])
        memory.unload(piece, mappings)


class DecoderWeights:
    """A decoder's weights as the step reads them now: those there are copies of by these, the others where they lie.

    copies: match tensors, or None: then weights are read (out, in) or (in, out), which takes up to a quarter longer.
    Sums and activations are float32 always. Made for each generation: biases and norms that are not float32 are
    converted here.
    by_weight: the copies by the id of their weight, for `linear`.
    """

    def __init__(self, tensors: DecoderTensors, copies: DecoderCopies | None = None):
        if reason := native.load():
            raise RuntimeError(reason)
        self.tensors, self.copies = tensors, copies
        self.by_weight: dict[int, PanelWeight] = {}
        panels = None if copies is None else iter(copies.panels)
        self.weights: list[list[torch.Tensor | None]] = []  # of each layer: weight, bias, weight, bias ...
        for layer in tensors.layers:
            whole = layer.gate is not None  # the products that a gate is for are not done in parts
            slots = zip(layer.projections, (3, 1, 1, 1, 1, 1, 1))
            self.weights.append([t for p, places in slots for t in self._pairs(p, panels, places, whole)])
        self.head = self._pairs(tensors.head, panels, 1)
        read = [t for slots in (*self.weights, self.head) for t in slots[::2] if t is not None]
        self.split_floats = max(map(_ops.cpu_decoder_split_floats.default, read))
        self.norms = [_norm_arguments(layer.norms) for layer in tensors.layers]
        self.stack_norms = _norm_arguments((tensors.embedding_norm, tensors.final_norm))
        shared = self._by_distance(tensors.relative)
        self.relative = [shared if w.relative is None else self._by_distance(w.relative) for w in tensors.layers]

    def _by_distance(self, table: torch.Tensor | None) -> torch.Tensor | None:
        """A table (buckets, H) of relative positions as float32 (H, distances)."""
        if table is None:
            return None
        longest = self.tensors.relative_max_distance
        buckets = relative_buckets(-torch.arange(longest + 1), table.shape[0], longest, False)
        return table.detach()[buckets].t().to(torch.float32).contiguous()

    def _pairs(
        self, p: Projection | None, panels: Iterator[torch.Tensor] | None, places: int, rows: bool = False
    ) -> list[torch.Tensor | None]:
        """weight, bias, weight, bias ... of `places` weights. rows: as (out, in) only."""
        found: list[torch.Tensor | None] = []
        if p is None:
            return [None] * (2 * places)
        for i, (weight, read) in enumerate(zip(p.weights, p.read(panels, rows))):
            if panels is not None and isinstance(weight, torch.Tensor):
                out = weight.shape[1 if p.transposed else 0]
                self.by_weight[id(weight)] = PanelWeight.of_panels(read, out)
            found += [read, p.bias(i)]
        return found + [None] * (2 * places - len(found))


def _panels(weight: torch.Tensor) -> int:
    return -(-weight.shape[0] // _PANEL)


def _norm_arguments(norms: tuple[Norm | None, ...]) -> tuple[list[torch.Tensor | None], list[float]]:
    tensors: list[torch.Tensor | None] = []
    for n in norms:
        for t in (None, None) if n is None else (n.weight, n.bias):
            tensors.append(None if t is None else t.detach().to(torch.float32).contiguous())
    return tensors, [-1.0 if n is None else n.eps for n in norms]


@dataclass
class DecoderCache:
    """The state of rows that are being decoded: their keys and values, and which of them each row attends to.

    rows: the most there will be. capacity: positions there is room for at first; it doubles when they are used up.
    cross_shape: (sources, length) of the encoder's states where there is cross-attention.

    keys, values: (layers, rows, key heads, capacity, D), cross_keys, cross_values: (layers, sources, H, length, D),
    float32, or bfloat16 for a bfloat16 model and for keys and values that are products in int8. table: (rows, capacity)
    int32, the cache row that holds a row's key at each position, -1 where there is nothing to attend to: so beams are
    reordered by their lines of the table alone.
    sources: (rows,) int32, the encoder's sequence of each row; cross_lengths: (sources,) int32.
    """

    weights: DecoderWeights
    rows: int
    capacity: int
    cross_shape: tuple[int, int] | None = None
    length: int = field(default=0, init=False)

    def __post_init__(self):
        t = self.weights.tensors
        # Products in int8 round keys and values far more than bfloat16 does.
        int8 = all(isinstance(w, Int8Weight) for layer in t.layers for w in layer.qkv.weights)
        self.dtype = torch.bfloat16 if t.token.dtype == torch.bfloat16 or int8 else torch.float32
        self.live = self.rows
        device, layers = torch.device("cpu"), len(t.layers)
        self.table = torch.full((self.rows, self.capacity), -1, dtype=torch.int32)
        self.keys, self.values = self._room(self.rows, self.capacity), self._room(self.rows, self.capacity)
        self.cross_keys = self.cross_values = self.sources = self.cross_lengths = None
        if self.cross_shape is not None:
            self.cross_keys, self.cross_values = self._room(*self.cross_shape), self._room(*self.cross_shape)
            self.sources = torch.zeros(self.rows, dtype=torch.int32)
            self.cross_lengths = torch.zeros(self.cross_shape[0], dtype=torch.int32)
        self._feed_forward = t.layers[0].up.shape[0] if t.layers else 0
        self._vocabulary = t.head.shape[0]
        heads = 2 * t.heads + 2 * self._key_heads
        floats = 2 * t.token.shape[1] + heads * t.head_dim + self._feed_forward + self.weights.split_floats
        self._workspace = memory.empty((self.rows * floats,), torch.float32, device)
        self._phases = torch.empty(_ops.cpu_decoder_phase_bytes.default(layers), dtype=torch.uint8)
        self._plan = torch.empty(_ops.cpu_decoder_plan_bytes.default(layers), dtype=torch.uint8)
        self._logits = memory.empty((self.rows, self._vocabulary), torch.float32, device)
        self._angles: tuple[torch.Tensor | None, ...] = (None, None)
        self._cover_angles(self.capacity)
        self._make_plan()

    @property
    def _key_heads(self) -> int:
        t = self.weights.tensors
        return t.heads if t.key_heads is None else t.key_heads

    def _room(self, rows: int, length: int) -> torch.Tensor:
        t = self.weights.tensors
        shape = (len(t.layers), rows, self._key_heads, length, t.head_dim)
        return memory.empty(shape, self.dtype, torch.device("cpu"))

    def _make_plan(self) -> None:
        weights, t = self.weights, self.weights.tensors
        self._tables = [p if p is None else p.detach().contiguous() for p in (t.token, t.position)]
        _ops.cpu_decoder_plan_stack.default(
            self._plan, self._phases, self._workspace, *self._tables, t.embed_scale, *weights.stack_norms, t.rms,
            t.pre_norm, ACTIVATIONS.index(t.activation), weights.head, t.head_scale, self._vocabulary, *self._angles,
            t.rotary_interleaved, t.parallel, t.qkv_by_head, t.softcap, t.logits_softcap, len(t.layers),
            t.heads, self._key_heads, t.head_dim, self._feed_forward, self.rows, self.capacity,
            0 if self.cross_shape is None else self.cross_shape[1], self.dtype,
        )  # fmt: skip
        for i, layer in enumerate(t.layers):
            cross = (None, None) if self.cross_keys is None else (self.cross_keys[i], self.cross_values[i])
            _ops.cpu_decoder_plan_layer.default(
                self._plan, i, *weights.norms[i], t.rms, weights.weights[i], [self.keys[i], self.values[i], *cross],
                weights.relative[i], layer.scale, layer.cross_scale, layer.window or 0,
            )  # fmt: skip

    def cover(self, positions: int) -> None:
        """Have rows 0 .. positions - 1 in cos and sin, where positions are rotary, and in a table that grows."""
        t, changed = self.weights.tensors, self._cover_angles(positions)
        if t.longer_positions is not None and t.position.shape[0] < positions:  # type: ignore[union-attr]
            t.position, changed = t.longer_positions(max(positions, 2 * t.position.shape[0])), True  # type: ignore[union-attr]
        if changed:
            self._make_plan()

    def _cover_angles(self, positions: int) -> bool:
        rotary, cos = self.weights.tensors.rotary, self._angles[0]
        if rotary is None or (cos is not None and cos.shape[0] >= positions):
            return False
        rows = positions if cos is None else max(positions, 2 * cos.shape[0])
        self._angles = tuple(t.to(torch.float32).contiguous() for t in rotary(rows))
        return True

    def load(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """The prompts' keys and values of one layer, (B, H, S, D) with B <= rows, into cache rows 0..B-1; attend says
        who sees them."""
        batch, _, length, _ = keys.shape
        if length > self.capacity:
            self._grow(length)
        self.keys[layer, :batch, :, :length] = keys
        self.values[layer, :batch, :, :length] = values

    def load_cross(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """The encoder's keys and values of one layer, (sources, H, length, D), those to attend to first."""
        self.cross_keys[layer].copy_(keys)
        self.cross_values[layer].copy_(values)

    def attend(self, prompts: torch.Tensor, mask: torch.Tensor) -> None:
        """Row r goes on from the loaded prompt prompts[r] and sees those of its positions that mask (rows, S) keeps."""
        length = mask.shape[1]
        if length > self.capacity:
            self._grow(length)
        table = prompts.to(torch.int32)[:, None].expand(-1, length)
        self.table[: len(prompts), :length] = torch.where(mask, table, -1)
        self.length = length

    def step(self, ids: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        """Append ids (live rows,) int64 at positions (rows of the position table); logits (live rows, V), float32, in
        memory that the next step writes again. positions: of the tables of positions or of cos and sin. Raises
        RuntimeError for an id or a position out of range."""
        if self.length == self.capacity:
            self._grow(self.length + 1)
        logits = self._logits[: self.live]
        positions = None if positions is None else positions.contiguous()
        _ops.cpu_decoder_step.default(
            self._plan, ids.contiguous(), positions, self.table, self.sources, self.cross_lengths, self.length, logits
        )
        self.length += 1
        return logits

    def reorder(self, index: torch.Tensor) -> None:
        """Row r goes on from what row index[r] holds; fewer rows than before are all there is from then on."""
        self.live = len(index)
        self.table[: self.live, : self.length] = self.table[index, : self.length]
        if self.sources is not None:
            self.sources[: self.live] = self.sources[index]

    def gather(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of each layer as the rows see them, (live rows, H, length, D); zeros where they see none, in
        the model's dtype."""
        table = self.table[: self.live, : self.length]
        seen, rows = (table >= 0)[:, :, None, None], table.clamp(min=0).long()
        positions, dtype = torch.arange(self.length).expand_as(rows), self.weights.tensors.token.dtype
        return [
            tuple(torch.where(seen, x[rows, :, positions], 0).transpose(1, 2).to(dtype) for x in (keys, values))  # type: ignore[misc]
            for keys, values in zip(self.keys, self.values)
        ]

    def _grow(self, least: int) -> None:
        used, self.capacity = self.length, max(2 * self.capacity, least)
        table, keys, values = self.table, self.keys, self.values
        self.table = torch.full((self.rows, self.capacity), -1, dtype=torch.int32)
        self.keys, self.values = self._room(self.rows, self.capacity), self._room(self.rows, self.capacity)
        self.table[:, :used] = table[:, :used]
        self.keys[..., :used, :], self.values[..., :used, :] = keys[..., :used, :], values[..., :used, :]
        self._make_plan()
