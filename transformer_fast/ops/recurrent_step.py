"""One step of a recurrent decoder in one call: one token per row through cells, attention and output layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..backends import Call, eager_recurrence, memory, native, select
from ..backends.specs import RecurrentStepSpec
from . import _common
from .decoder_step import DecoderCopies
from .decoder_tensors import Projection
from .head_screen import HeadScreen

__all__ = ["CellTensors", "RecurrentSource", "RecurrentTensors", "RecurrentWeights", "recurrent_step"]

_ops = torch.ops.transformer_fast


class CellTensors(NamedTuple):
    """One layer, laid out as in torch.nn.GRU and LSTM: weight_ih (G * H, in), weight_hh (G * H, H), biases (G * H,)."""

    weight_ih: torch.Tensor
    weight_hh: torch.Tensor
    bias_ih: torch.Tensor | None = None
    bias_hh: torch.Tensor | None = None


# ---- the op ----------------------------------------------------------------------------------------
def _forward(*fields) -> tuple[torch.Tensor, ...]:
    """Logits, hidden state, memory and feed; the last two are empty if the spec has none."""
    spec = RecurrentStepSpec(*fields)
    hidden, device = spec.hidden, spec.hidden.device
    shapes = [(len(spec.ids), spec.head.shape[0]), *(None if t is None else t.shape for t in (hidden, *spec[3:5]))]
    found = [memory.empty(s or (0,), hidden.dtype, device) for s in shapes]
    if len(spec.ids):
        backend = select(Call("recurrent_step", device.type, hidden.dtype, hidden.shape[2]))
        backend.recurrent_step(spec, *(t if s else None for s, t in zip(shapes, found)))  # type: ignore[arg-type]
    return tuple(found)


def _fake(*fields):
    spec = RecurrentStepSpec(*fields)
    new = spec.hidden.new_empty
    states = (new((0,)) if t is None else new(t.shape) for t in spec[2:5])
    return (new((spec.ids.shape[0], spec.head.shape[0])), *states)


_op = _common.define(
    "recurrent_step",
    f"({_common.schema_of(RecurrentStepSpec)}) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake,
)


def _shape(name: str, t: torch.Tensor | None, shape: tuple[int, ...], of: str, like: torch.Tensor) -> None:
    if t is None:
        return
    _common.check_floating(name, t)
    _common.check_same(name, t, "hidden", like)
    if tuple(t.shape) != shape:
        raise ValueError(f"{name}: wanted shape {of} = {shape}, got {tuple(t.shape)}")


def _check(spec: RecurrentStepSpec) -> None:
    ids, token, hidden, memory, feed, keys, values = spec[:7]
    _common.check_floating("hidden", hidden)
    if hidden.dim() != 3 or not hidden.shape[0] or not hidden.shape[2]:
        raise ValueError(f"hidden: wanted shape (layers, rows, H), got {tuple(hidden.shape)}")
    layers, rows, width = hidden.shape
    _integers("ids", ids, (rows,), hidden)
    _common.check_floating("token", token)
    if token.dim() != 2:
        raise ValueError(f"token: wanted shape (tokens, E), got {tuple(token.shape)}")
    _range("ids", ids, token.shape[0])
    embedding = token.shape[1]
    _shape("token", token, tuple(token.shape), "(tokens, E)", hidden)
    _shape("memory", memory, (layers, rows, width), "(layers, rows, H)", hidden)
    _common.check_floating("head", spec.head)
    if spec.head.dim() != 2:
        raise ValueError(f"head: wanted shape (vocabulary, P), got {tuple(spec.head.shape)}")
    size = spec.head.shape[1]
    _shape("head", spec.head, tuple(spec.head.shape), "(vocabulary, P)", hidden)
    _shape("head_bias", spec.head_bias, (spec.head.shape[0],), "(vocabulary,)", hidden)
    if len(spec.cells) != 4 * layers:
        raise ValueError(f"cells: wanted {layers}, as hidden has layers, got {len(spec.cells) // 4}")
    if values is None:
        given = [n for n in ("feed", "keys", "mask", "sources", "query", "score_weight", "readout", "readout_bias")
                 if getattr(spec, n) is not None]  # fmt: skip
        if given or spec.maxout:
            raise ValueError(f"values: wanted a tensor with {', '.join(given) or 'maxout'}, got none")
        if size != width:
            raise ValueError(
                f"head: wanted shape (vocabulary, H = {width}) without values, got {tuple(spec.head.shape)}"
            )
    else:
        _check_source(spec, rows, width, embedding, size)
    beside = width if spec.maxout else 0 if feed is None else size
    gates = 3 if memory is None else 4
    for layer in range(layers):
        inner = width if layer else embedding + beside
        weight_ih, weight_hh, *biases = spec.cells[4 * layer : 4 * layer + 4]
        for name, w, n in (("weight_ih", weight_ih, inner), ("weight_hh", weight_hh, width)):
            _common.check_tensor(f"cells[{layer}].{name}", w)
            _shape(f"cells[{layer}].{name}", w, (gates * width, n), f"({gates} * H, in)", hidden)
        for name, bias in zip(("bias_ih", "bias_hh"), biases):
            _shape(f"cells[{layer}].{name}", bias, (gates * width,), f"({gates} * H,)", hidden)


def _check_source(spec: RecurrentStepSpec, rows: int, width: int, embedding: int, size: int) -> None:
    hidden, keys, values = spec.hidden, spec.keys, spec.values
    assert values is not None
    _common.check_floating("values", values)
    if values.dim() != 3:
        raise ValueError(f"values: wanted shape (sources, length, H), got {tuple(values.shape)}")
    count, length = values.shape[:2]
    _shape("values", values, (count, length, width), "(sources, length, H)", hidden)
    if keys is None:
        if length != 1 or spec.mask is not None or spec.query is not None or spec.score_weight is not None:
            raise ValueError("keys: wanted a tensor, as values have more than one state per source, got none")
        scored = width
    else:
        scored = keys.shape[2] if keys.dim() == 3 else width
        scored = scored if spec.query is not None else width
        _shape("keys", keys, (count, length, scored), "(sources, length, W)", hidden)
    _shape("query", spec.query, (scored, width), "(W, H)", hidden)
    _shape("score_weight", spec.score_weight, (scored,), "(W,)", hidden)
    if keys is not None and spec.score_weight is None and scored != width:
        raise ValueError(f"keys: wanted width {width} without score_weight, got {scored}")
    if spec.mask is not None:
        _common.check_tensor("mask", spec.mask)
        if spec.mask.dtype != torch.bool:
            raise TypeError(f"mask: wanted a bool tensor, got {spec.mask.dtype}")
        if tuple(spec.mask.shape) != (count, length):
            raise ValueError(f"mask: wanted shape {(count, length)} as values, got {tuple(spec.mask.shape)}")
        _common.check_same("mask", spec.mask, "hidden", hidden, dtype=False)
    if spec.sources is not None:
        _integers("sources", spec.sources, (rows,), hidden)
        _range("sources", spec.sources, count)
    elif rows > count:
        raise ValueError(f"sources: wanted a tensor for {rows} rows of {count} sources, got none")
    outer, inner = (2 * size, 2 * width + embedding) if spec.maxout else (size, 2 * width)
    _common.check_tensor("readout", spec.readout)
    _shape("readout", spec.readout, (outer, inner), "(2 * P, 2 * H + E)" if spec.maxout else "(P, 2 * H)", hidden)
    _shape("readout_bias", spec.readout_bias, (outer,), "(2 * P,)" if spec.maxout else "(P,)", hidden)
    if spec.maxout and spec.feed is not None:
        raise ValueError("feed: wanted none with maxout, whose cells read the context")
    _shape("feed", spec.feed, (rows, size), "(rows, P)", hidden)


def _integers(name: str, t, shape: tuple[int, ...], like: torch.Tensor) -> None:
    _common.check_integers(name, t)
    if tuple(t.shape) != shape:
        raise ValueError(f"{name}: wanted shape {shape}, got {tuple(t.shape)}")
    _common.check_same(name, t, "hidden", like, dtype=False)


def _range(name: str, t: torch.Tensor, end: int) -> None:
    if t.device.type != "cpu" or not t.numel() or not _common.concrete(t) or torch.compiler.is_compiling():
        return
    low, high = (int(n) for n in torch.aminmax(t))
    if low < 0 or high >= end:
        raise ValueError(f"{name}: wanted values in [0, {end}), got {low if low < 0 else high}")


def recurrent_step(
    ids: torch.Tensor,
    token: torch.Tensor,
    cells: Sequence[Sequence[torch.Tensor | None]],
    head: torch.Tensor,
    hidden: torch.Tensor,
    memory: torch.Tensor | None = None,
    *,
    head_bias: torch.Tensor | None = None,
    feed: torch.Tensor | None = None,
    keys: torch.Tensor | None = None,
    values: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    sources: torch.Tensor | None = None,
    query: torch.Tensor | None = None,
    score_weight: torch.Tensor | None = None,
    readout: torch.Tensor | None = None,
    readout_bias: torch.Tensor | None = None,
    maxout: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """logits = W_head readout(s_t, c_t) + b,  s_t = cells([token[id]; feed or c_t], s_(t-1)),  c_t the attention
    context of the source: one step of a recurrent decoder in one call.

    Luong's decoder attends with the state after the step, c_t = attend(s_t), and its readout tanh(W [c_t; s_t]) may be
    fed to the next step. Bahdanau's decoder (maxout) attends with the state before the step, c_t = attend(s_(t-1)), and
    its cells read c_t too; its readout is the maximum over pairs of neighbours of W [s_t; token[id]; c_t] + b.
    Attention weights are softmax(keys . q), or softmax(v . tanh(keys + q)) with a score_weight v, where q = W_query s.
    Without values the readout is s_t. With gradients the op runs in plain PyTorch.

    Args:
        ids: (R,) int32 or int64, one token per row.
        token: (tokens, E), the embedding table; all floating-point tensors have hidden's dtype.
        cells: per layer (weight_ih, weight_hh, bias_ih, bias_hh), laid out as in torch.nn.GRU and LSTM; biases may be
            None.
        head: (vocabulary, P), or (vocabulary, H) without values.
        hidden: (layers, R, H), the states before the step; float16, bfloat16 or float32 (float64 in plain PyTorch).
        memory: (layers, R, H) for an LSTM; None: the cells are GRUs.
        head_bias: (vocabulary,) or None.
        feed: (R, P), the last readout, if the cells read it.
        keys: (N, S, W), for N sources; None: the context is values[:, 0].
        values: (N, S, H).
        mask: bool (N, S); True takes part. A row without positions to attend to gets a context of zeros.
        sources: (R,) int32 or int64, the source that each row attends to; None: row r attends to source r.
        query: (W, H); None if W = H and the state itself is the query.
        score_weight: (W,); None for dot products.
        readout: (P, 2 * H), with maxout (2 * P, 2 * H + E).
        readout_bias: (P,), with maxout (2 * P,), or None.
        maxout: use Bahdanau's decoder.

    Returns:
        Logits (R, vocabulary), the hidden states (layers, R, H) and memories (layers, R, H) after the step, and the new
        feed (R, P). Memory and feed are None if None was passed.

    Raises:
        TypeError, ValueError: if an argument is invalid; the message names it, its value and what is expected.

    Source:
        Bahdanau, Cho and Bengio, "Neural Machine Translation by Jointly Learning to Align and Translate", 2015; Luong,
        Pham and Manning, "Effective Approaches to Attention-based Neural Machine Translation", 2015.

    Examples:
        >>> import torch, transformer_fast
        >>> token, cell = torch.randn(9, 4), (torch.randn(24, 4), torch.randn(24, 8), None, None)
        >>> ids, hidden = torch.tensor([3, 5]), torch.zeros(1, 2, 8)
        >>> logits, hidden, *_ = transformer_fast.ops.recurrent_step(ids, token, [cell], torch.randn(9, 8), hidden)
        >>> logits.shape
        torch.Size([2, 9])
    """
    _common.check_flag("maxout", maxout)
    flat: list[torch.Tensor | None] = []
    for i, cell in enumerate(cells):
        if len(cell) != 4:
            raise ValueError(f"cells[{i}]: wanted weight_ih, weight_hh, bias_ih, bias_hh, got {len(cell)} entries")
        flat += cell
    spec = RecurrentStepSpec(
        ids, token, hidden, memory, feed, keys, values, mask, sources, query, score_weight, flat, readout,
        readout_bias, head, head_bias, bool(maxout),
    )  # fmt: skip
    _common.check_floating("hidden", hidden)
    cast = _common.autocast_dtype(hidden.device)
    if cast is not None:
        spec = RecurrentStepSpec(*(_cast(field, cast) for field in spec))
    _check(spec)
    spec = spec._replace(ids=ids.to(torch.int64), sources=None if sources is None else sources.to(torch.int64))
    tensors = [t for field in spec[:-1] for t in (field if isinstance(field, list) else (field,))]
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if wanted or _common.transformed():
        return eager_recurrence.recurrent_step(spec)  # type: ignore[return-value]
    logits, *states = (_forward if _common.direct(*tensors) else _op)(*spec)
    before = (hidden, memory, feed)
    return (logits, *(None if t is None else s for s, t in zip(states, before)))  # type: ignore[return-value]


def _cast(field, dtype: torch.dtype):
    if isinstance(field, list):
        return [_cast(t, dtype) for t in field]
    return field.to(dtype) if isinstance(field, torch.Tensor) and field.is_floating_point() else field


# ---- decoding with the same weights in many steps --------------------------------------------------
@dataclass
class RecurrentTensors:
    """The tensors and options of a recurrent decoder; see recurrent_step. lstm: the cells are LSTMs, else GRUs."""

    token: torch.Tensor
    cells: list[CellTensors]
    lstm: bool
    head: Projection
    query: Projection | None = None
    score_weight: torch.Tensor | None = None
    readout: Projection | None = None
    maxout: bool = False

    @property
    def gates(self) -> list[Projection]:
        """weight_ih and weight_hh of each layer, each as a projection with one weight (H, in) per gate."""
        found = []
        for cell in self.cells:
            for weight in cell[:2]:
                parts = weight.detach().split(cell.weight_hh.shape[1])
                found.append(Projection(tuple(parts), (None,) * len(parts)))
        return found

    def projections(self) -> list[Projection]:
        return [p for p in (*self.gates, self.query, self.readout, self.head) if p is not None]

    def weights(self) -> list[torch.Tensor]:
        """The floating-point weights of all projections, which are the ones that DecoderCopies copies."""
        return [w.detach() for p in self.projections() for w in p.weights if isinstance(w, torch.Tensor)]

    def sources(self) -> list[torch.Tensor]:
        """Every tensor that the computation reads."""
        found = [t for cell in self.cells for t in cell] + [self.token, self.score_weight]
        found += [t for p in (self.query, self.readout, self.head) if p is not None for t in (*p.tensors(), *p.biases)]
        return [t for t in found if t is not None]


@dataclass
class RecurrentSource:
    """The sources that all steps attend to; see recurrent_step. keys, values: float32, contiguous. mask: bool. rows:
    int32 (R,), the source of each row."""

    keys: torch.Tensor | None
    values: torch.Tensor | None
    mask: torch.Tensor | None
    rows: torch.Tensor


class RecurrentWeights:
    """A recurrent decoder's weights in the form that a step reads: `copies`, which must match the tensors, or the
    weights themselves.

    Sums and activations are always float32. Make a new one for each generation: biases that are not float32 are
    converted here.
    """

    def __init__(self, tensors: RecurrentTensors, copies: DecoderCopies | None = None):
        if reason := native.load():
            raise RuntimeError(reason)
        self.tensors, self.copies = tensors, copies
        panels = None if copies is None else iter(copies.panels)
        self._token = tensors.token.detach().contiguous()
        self._score_weight = wide(tensors.score_weight)
        self._weights: list[torch.Tensor | None] = [w for p in tensors.gates for w in p.read(panels, rows=True)]
        self._biases = [wide(b) for cell in tensors.cells for b in cell[2:]]
        for p in (tensors.query, tensors.readout, tensors.head):
            self._weights += [None] if p is None else p.read(panels)
            self._biases.append(None if p is None else p.bias(0))
        self.vocabulary, self.readout_size = tensors.head.shape

    def step(
        self,
        ids: torch.Tensor,
        state: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None],
        source: RecurrentSource,
        logits: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Run one step: write logits (R, V) float32 and return the new state.

        ids: (R,) int64. state: hidden, memory and feed, float32 and contiguous. Raises RuntimeError for an id out of
        range.
        """
        return self._run(ids, state, source, logits)

    def choose(
        self,
        ids: torch.Tensor,
        state: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None],
        source: RecurrentSource,
        screen: HeadScreen,
        bounds: torch.Tensor,
        barred: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, float, tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]]:
        """As `step`, but find the token with the largest logit per row without computing all logits.

        screen: the HeadScreen of the head's weight; bounds: screen.bounds(head_bias). barred: int64 tokens to exclude.
        Returns the tokens (R,) int64 (the first of equal ones), the fraction of the logits that had to be computed, and
        the new state.
        """
        tokens = torch.empty(len(ids) + 1, dtype=torch.int64)
        after = self._run(ids, state, source, None, screen.panels, bounds, barred, tokens)
        return tokens[:-1], int(tokens[-1]) / len(screen.panels), after

    def _run(self, ids, state, source, logits, *choice):
        after = tuple(None if t is None else memory.empty_like(t) for t in state)
        _ops.cpu_recurrent_step.default(
            ids.contiguous(), self._token, *state, source.keys, source.values, source.mask,
            source.rows if source.values is not None else None,
            self._score_weight, self._weights, self._biases, self.tensors.maxout, self.readout_size, *after, logits,
            *(choice or (None,) * 4), self.vocabulary,
        )  # fmt: skip
        return after

    @property
    def head_bias(self) -> torch.Tensor | None:
        return self._biases[-1]


def wide(t: torch.Tensor | None) -> torch.Tensor | None:
    """A state or vector as a step reads it: float32 and contiguous."""
    return None if t is None else t.detach().to(torch.float32).contiguous()
