"""One decoding step in one native call: one token per row through all layers of a decoder, with in-place caches.

It is for inference on the CPU, where the time of a step with few rows should be that of one pass over the weights. It
has no autograd and no fake kernel; tracing and differentiation use the model's own forward.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ..backends import memory, native
from ..backends.contents import Contents, FileMappings
from ..backends.eager import relative_buckets
from .activation import ACTIVATIONS
from .decoder_tensors import DecoderTensors, Norm, Projection, StepTensors
from .linear_int8 import Int8Weight
from .linear_panel import _PANEL, STORAGES, PanelWeight, panel_rows

__all__ = ["DecoderCache", "DecoderCopies", "DecoderWeights"]

_ops = torch.ops.transformer_fast
_PIECE = 64 * _PANEL  # rows of a weight per copy


class DecoderCopies:
    """Copies of a decoder's weights in the panel layout for few rows. Embedding tables are not copied.

    storage: torch.float32, torch.bfloat16 or torch.int8 (see to_panels); None for the weights' own dtype. Weights in a
    mapped checkpoint file release their memory once copied; other weights stay in memory in addition to their copies.
    Copies do not follow later changes of the weights: check `match`, and make new ones if it returns False.
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
        # One allocation, so that nearly all of it is in large pages. Reading small pages takes up to half as long
        # again.
        arena = memory.empty((sum(sizes),), storage, torch.device("cpu"))
        self.bytes = arena.nbytes
        self.panels: list[torch.Tensor] = []  # one per weight
        self._contents, mappings = Contents(), FileMappings()
        for weight, part, piece in zip(tensors.weights(), parts, arena.split(sizes)):
            self._contents.note([weight], mappings)
            self.panels.append(piece.view(-1, panel_rows(part.shape[1], storage), _PANEL))
            _lay_out(part, self.panels[-1], mappings)

    def match(self, tensors: StepTensors) -> bool:
        """True if copies made of the weights now would be the same; see backends.contents."""
        return self._contents.same(tensors.weights())


def _lay_out(weight: torch.Tensor, panels: torch.Tensor, mappings: FileMappings) -> None:
    # Piece by piece, so that memory never holds the weight and its copy in full.
    step = weight.shape[0] if weight.stride(1) != 1 else _PIECE
    for begin in range(0, weight.shape[0], step):
        piece = weight[begin : begin + step]
        _ops.cpu_to_panels.default(piece, panels[begin // _PANEL :][: _panels(piece)])
        memory.unload(piece, mappings)


class DecoderWeights:
    """A decoder's weights in the form that a step reads: the copies where there are any, else the weights themselves.

    copies: must match the tensors; or None, and weights are read in their own (out, in) or (in, out) layout, which
        takes
    up to a quarter longer. Sums and activations are always float32. Make a new one for each generation: biases and
    norms that are not float32 are converted here. by_weight: the copies as PanelWeights, by the id of their weight, for
    `linear`. can_choose: whether DecoderCache.choose works with them.
    """

    def __init__(self, tensors: DecoderTensors, copies: DecoderCopies | None = None):
        if reason := native.load():
            raise RuntimeError(reason)
        self.tensors, self.copies = tensors, copies
        self.by_weight: dict[int, PanelWeight] = {}
        panels = None if copies is None else iter(copies.panels)
        self.weights: list[list[torch.Tensor | None]] = []  # per layer: weight, bias, weight, bias, ...
        for layer in tensors.layers:
            whole = layer.gate is not None  # a gated product needs complete sums, so its weights are read as (out, in)
            slots = zip(layer.projections, (3, 1, 1, 1, 1, 1, 1))
            self.weights.append([t for p, places in slots for t in self._pairs(p, panels, places, whole)])
        self.head = self._pairs(tensors.head, panels, 1)
        head: Any = self.head[0]
        self.can_choose = head.dtype == torch.int8 or head.dim() == 3 or head.stride(1) == 1
        read = [t for slots in (*self.weights, self.head) for t in slots[::2] if t is not None]
        self.split_floats = max(map(_ops.cpu_decoder_split_floats.default, read))
        self.norms = [_norm_arguments(layer.norms) for layer in tensors.layers]
        self.stack_norms = _norm_arguments((tensors.embedding_norm, tensors.final_norm))
        shared = self._by_distance(tensors.relative)
        self.relative = [shared if w.relative is None else self._by_distance(w.relative) for w in tensors.layers]

    def _by_distance(self, table: torch.Tensor | None) -> torch.Tensor | None:
        """The bias of a table (buckets, H) at each distance, float32 (H, relative_max_distance + 1)."""
        if table is None:
            return None
        longest = self.tensors.relative_max_distance
        buckets = relative_buckets(-torch.arange(longest + 1), table.shape[0], longest, False)
        return table.detach()[buckets].t().to(torch.float32).contiguous()

    def _pairs(
        self, p: Projection | None, panels: Iterator[torch.Tensor] | None, places: int, rows: bool = False
    ) -> list[torch.Tensor | None]:
        """weight, bias, weight, bias, ... of a projection, padded with None to `places` pairs. rows: see
        Projection.read."""
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
    """The state of the rows that are being decoded: keys and values, and which of them each row attends to.

    rows: the maximum number of rows. capacity: the initial number of positions; it doubles when it is used up.
    cross_shape: (sources, length) of the encoder's states, if there is cross-attention. kept: where the memory comes
    from and goes back to.

    keys, values: (layers, rows, key heads, capacity, D); cross_keys, cross_values: (layers, sources, H, length, D).
    They are float32, or bfloat16 for a bfloat16 model and for int8 key and value projections. table: (rows, capacity)
    int32, the cache row that holds a row's key at each position, or -1 for no key. So reordering beams only changes the
    table. sources: (rows,) int32, the encoder sequence of each row. cross_lengths: (sources,) int32.
    """

    weights: DecoderWeights
    rows: int
    capacity: int
    cross_shape: tuple[int, int] | None = None
    kept: memory.Kept = field(default_factory=lambda: memory.Kept(0))
    length: int = field(default=0, init=False)

    def __post_init__(self):
        t = self.weights.tensors
        # The error of int8 products in keys and values is far larger than bfloat16's rounding.
        int8 = all(isinstance(w, Int8Weight) for layer in t.layers for w in layer.qkv.weights)
        self.dtype = torch.bfloat16 if t.token.dtype == torch.bfloat16 or int8 else torch.float32
        self.live = self.rows
        self._memory, layers = memory.Loan(self.kept), len(t.layers)
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
        self._workspace = self._memory.empty((self.rows * floats,), torch.float32)
        self._phases = torch.empty(_ops.cpu_decoder_phase_bytes.default(layers), dtype=torch.uint8)
        self._plan = torch.empty(_ops.cpu_decoder_plan_bytes.default(layers), dtype=torch.uint8)
        self._logits: torch.Tensor | None = None
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
        return self._memory.empty(shape, self.dtype)

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
        """Make sure that cos and sin of rotary positions, and a position table that grows, have `positions` rows."""
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
        """Copy the prompts' keys and values of one layer, (B, H, S, D) with B <= rows, to cache rows 0 .. B - 1.
        `attend` sets which rows attend to them."""
        batch, _, length, _ = keys.shape
        if length > self.capacity:
            self._grow(length)
        self.keys[layer, :batch, :, :length] = keys
        self.values[layer, :batch, :, :length] = values

    def load_cross(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Copy the encoder's keys and values of one layer, (sources, H, length, D). In each source the positions to
        attend to come first."""
        self.cross_keys[layer].copy_(keys)
        self.cross_values[layer].copy_(values)

    def attend(self, prompts: torch.Tensor, mask: torch.Tensor) -> None:
        """Let row r continue the loaded prompt prompts[r] and attend to its positions where mask (rows, S) is True."""
        length = mask.shape[1]
        if length > self.capacity:
            self._grow(length)
        table = prompts.to(torch.int32)[:, None].expand(-1, length)
        self.table[: len(prompts), :length] = torch.where(mask, table, -1)
        self.length = length

    def step(self, ids: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        """Append one token per row and return the logits.

        Args:
            ids: (live rows,) int64.
            positions: (live rows,), rows of the position table or of cos and sin; None if the model has no positions.

        Returns:
            Logits (live rows, V) float32, in memory that the next step overwrites.

        Raises:
            RuntimeError: for an id or a position out of range.
        """
        logits = self._room_for_logits()
        self._append(_ops.cpu_decoder_step.default, ids, positions, logits)
        return logits

    def choose(self, ids: torch.Tensor, positions: torch.Tensor | None, barred: torch.Tensor | None) -> torch.Tensor:
        """Append one token per row, as step does, and return the next one: the first of the row's largest logits.

        Args:
            ids: see step.
            positions: see step.
            barred: (n,) int64, tokens whose logits count as -inf, or None.

        Returns:
            (live rows,) int64. A logit that is NaN counts as the largest, as for torch.argmax.

        Raises:
            RuntimeError: see step; or for weights that cannot choose.
        """
        tokens = torch.empty((self.live, 1), dtype=torch.int64)
        self._append(_ops.cpu_decoder_choose.default, ids, positions, barred, tokens, None, None)
        return tokens.squeeze(1)

    def rank(
        self, ids: torch.Tensor, positions: torch.Tensor | None, count: int, barred: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append one token per row, as step does, and return the best next ones.

        Args:
            ids: see step.
            positions: see step.
            count: how many, 1 .. V.
            barred: (n,) int64, tokens whose log-probabilities count as -inf, or None.

        Returns:
            Log-probabilities of the softmax over all tokens, largest first, float32 (live rows, count), and the tokens,
            int64 (live rows, count).

        Raises:
            RuntimeError: see step.
        """
        tokens = torch.empty((self.live, count), dtype=torch.int64)
        values = torch.empty((self.live, count), dtype=torch.float32)
        logits = self._room_for_logits()
        self._append(_ops.cpu_decoder_choose.default, ids, positions, barred, tokens, values, logits)
        return values, tokens

    def _room_for_logits(self) -> torch.Tensor:
        if self._logits is None:
            self._logits = self._memory.empty((self.rows, self._vocabulary), torch.float32)
        return self._logits[: self.live]

    def _append(self, step: Callable[..., None], ids: torch.Tensor, positions: torch.Tensor | None, *more: Any) -> None:
        if self.length == self.capacity:
            self._grow(self.length + 1)
        positions = None if positions is None else positions.contiguous()
        step(self._plan, ids.contiguous(), positions, self.table, self.sources, self.cross_lengths, self.length, *more)
        self.length += 1

    def reorder(self, index: torch.Tensor) -> None:
        """Let row r continue from the state of row index[r]. If index has fewer rows than before, only those remain."""
        self.live = len(index)
        self.table[: self.live, : self.length] = self.table[index, : self.length]
        if self.sources is not None:
            self.sources[: self.live] = self.sources[index]

    def gather(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values per layer as each row attends to them, (live rows, H, length, D) in the model's dtype; zeros
        at positions that a row does not attend to."""
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
        self._memory.give(keys), self._memory.give(values)
        self._make_plan()
