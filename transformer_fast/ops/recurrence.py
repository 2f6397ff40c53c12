"""Recurrent layers: all steps of a GRU or an LSTM in one call, and in one call back."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..backends import Backend, Call, eager_recurrence, memory, select
from . import _common
from .linear import linear

_GATES = {"lstm": 4, "gru": 3}


class RecurrenceSpec(NamedTuple):
    """One call, of an LSTM where there is a memory, else of a GRU. gates: (positions, G * H), what the input gives the
    gates, unit last stride; weight (G * H, H) and bias (G * H,), of the hidden state; hidden, memory: (B, H), before
    the first step; sequences: int64 (3, B): where each begins, its length, and their order, longest first; steps: at
    least the longest; reverse: from the last position of each to its first."""

    gates: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    hidden: torch.Tensor
    memory: torch.Tensor | None
    sequences: torch.Tensor
    steps: int
    reverse: bool


def _select(spec: RecurrenceSpec) -> Backend:
    return select(Call("recurrence", spec.gates.device.type, spec.gates.dtype, spec.weight.shape[1]))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def _spec(gates, weight, bias, hidden, memory_, sequences, steps, reverse) -> RecurrenceSpec:
    gates = gates if gates.stride(-1) == 1 else gates.contiguous()
    memory_ = None if memory_ is None else memory_.contiguous()
    return RecurrenceSpec(gates, weight, bias, hidden.contiguous(), memory_, sequences, steps, reverse)


def _forward(
    gates: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    hidden: torch.Tensor,
    memory_: torch.Tensor | None,
    sequences: torch.Tensor,
    steps: int,
    reverse: bool,
    gaps: bool,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """out, the last hidden state, the last memory, and where `keep` says so what the backward pass needs; tensors that
    there are none of are empty. gaps: some positions belong to no sequence, and get zeros."""
    spec = _spec(gates, weight, bias, hidden, memory_, sequences, steps, reverse)
    (positions, _), width, device = gates.shape, weight.shape[1], gates.device
    out = memory.empty((positions, width), gates.dtype, device)
    last = memory.empty(hidden.shape, gates.dtype, device)
    last_memory = memory.empty(hidden.shape if memory_ is not None else (0,), gates.dtype, device)
    wide, rows = _wide(gates.dtype), positions if keep else 0
    saved = memory.empty((rows, 4 * width), wide, device)
    memories = memory.empty((rows if memory_ is not None else 0, width), wide, device)
    buffers = (
        out, last, None if memory_ is None else last_memory, saved if keep else None,
        memories if keep and memory_ is not None else None,
    )  # fmt: skip
    if gaps:
        out.zero_()
    if positions and steps and hidden.numel():
        _select(spec).recurrence_forward(spec, *buffers)  # type: ignore[attr-defined]
    else:
        for buffer, result in zip(buffers[:3], (None, hidden, memory_)):
            if buffer is not None and result is not None:
                buffer.copy_(result)
        out.zero_()
    return out, last, last_memory, saved, memories


def _forward_fake(gates, weight, bias, hidden, memory_, sequences, steps, reverse, gaps, keep):
    width, wide = weight.shape[1], _wide(gates.dtype)
    rows = gates.shape[0] if keep else 0
    return (
        gates.new_empty((gates.shape[0], width)),
        gates.new_empty(hidden.shape),
        gates.new_empty(hidden.shape if memory_ is not None else (0,)),
        gates.new_empty((rows, 4 * width), dtype=wide),
        gates.new_empty((rows if memory_ is not None else 0, width), dtype=wide),
    )


def _backward_impl(
    grad_out: torch.Tensor | None,
    grad_last: torch.Tensor | None,
    grad_last_memory: torch.Tensor | None,
    out: torch.Tensor,
    saved: torch.Tensor,
    memories: torch.Tensor,
    gates: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    hidden: torch.Tensor,
    memory_: torch.Tensor | None,
    sequences: torch.Tensor,
    steps: int,
    reverse: bool,
    gaps: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients to gates, weight, bias, hidden and memory (empty where there is none)."""
    spec = _spec(gates, weight, bias, hidden, memory_, sequences, steps, reverse)
    shapes = [t.shape if t is not None else (0,) for t in (gates, weight, bias, hidden, memory_)]
    found = [memory.empty(shape, gates.dtype, gates.device) for shape in shapes]
    grads = [None if g is None else g.contiguous() for g in (grad_out, grad_last, grad_last_memory)]
    if gaps or not steps:
        found[0].zero_()
    if gates.numel() and steps and hidden.numel():
        _select(spec).recurrence_backward(spec, grads, out, saved, memories, *found)  # type: ignore[attr-defined]
    else:
        found[1].zero_(), found[2].zero_()
        for buffer, grad in zip(found[3:], grads[1:]):
            buffer.zero_() if grad is None or not buffer.numel() else buffer.copy_(grad)
    return tuple(found)  # type: ignore[return-value]


def _backward_fake(grad_out, grad_last, grad_last_memory, out, saved, memories, gates, weight, bias, hidden, memory_, *_):
    return tuple(gates.new_empty(t.shape if t is not None else (0,)) for t in (gates, weight, bias, hidden, memory_))


_TENSORS = (
    "Tensor gates, Tensor weight, Tensor? bias, Tensor hidden, Tensor? memory, Tensor sequences, int steps, "
    "bool reverse, bool gaps"
)
_backward_op = _common.define(
    "recurrence_backward",
    "(Tensor? grad_out, Tensor? grad_last, Tensor? grad_last_memory, Tensor out, Tensor saved, Tensor memories, "
    f"{_TENSORS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)


def _setup(ctx, inputs, output):
    *tensors, ctx.steps, ctx.reverse, ctx.gaps, _ = inputs
    out, _, _, saved, memories = output
    ctx.save_for_backward(*tensors, out, saved, memories)
    ctx.mark_non_differentiable(saved, memories)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_last, grad_last_memory, *_):
    *tensors, sequences, out, saved, memories = ctx.saved_tensors
    options = (sequences, ctx.steps, ctx.reverse)
    grads = (grad_out, grad_last, None if tensors[4] is None else grad_last_memory)
    nothing = (None,) * 5
    if all(g is None for g in grads):
        return (None,) * 5 + nothing
    if torch.is_grad_enabled():  # gradients of gradients

        def function(*tensors):
            return eager_recurrence.recurrence(RecurrenceSpec(*tensors, *options))[:3]

        return *_common.gradients(function, tensors, grads), *nothing
    found = _backward_op(*grads, out, saved, memories, *tensors, *options, ctx.gaps)
    return *(None if t is None else g for t, g in zip(tensors, found)), *nothing


_op = _common.define(
    "recurrence",
    f"({_TENSORS}, bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_setup,
    backward=_backward,
)


# ---- checks ----------------------------------------------------------------------------------------
def _check_weights(cell: str, input, weight_ih, weight_hh, biases) -> None:
    _common.check_floating("input", input)
    gates = _GATES[cell]
    for name, t in (("weight_ih", weight_ih), ("weight_hh", weight_hh)):
        _common.check_floating(name, t)
        _common.check_same(name, t, "input", input)
        if t.dim() != 2:
            raise ValueError(f"{name}: wanted 2 dimensions, got shape {tuple(t.shape)}")
    width = weight_hh.shape[1]
    for name, t, shape in (
        ("weight_hh", weight_hh, (gates * width, width)), ("weight_ih", weight_ih, (gates * width, input.shape[-1])),
        *((name, t, (gates * width,)) for name, t in biases),
    ):  # fmt: skip
        if t is None:
            continue
        if name.startswith("bias"):
            _common.check_floating(name, t)
            _common.check_same(name, t, "input", input)
        if tuple(t.shape) != tuple(shape):
            raise ValueError(f"{name}: wanted shape {tuple(shape)} for {gates} gates of {width}, got {tuple(t.shape)}")


def _check_states(cell: str, initial, input, batch: int, width: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    names = ["initial"]
    if cell == "lstm":
        if initial is not None and (not isinstance(initial, (tuple, list)) or len(initial) != 2):
            raise TypeError(f"initial: wanted two tensors, hidden state and memory, got {type(initial).__name__}")
        names = ["initial[0]", "initial[1]"]
    if initial is None:
        states = [input.new_zeros(batch, width) for _ in names]
    else:
        states = list(initial) if cell == "lstm" else [initial]
        for name, t in zip(names, states):
            _common.check_floating(name, t)
            _common.check_same(name, t, "input", input)
            if tuple(t.shape) != (batch, width):
                raise ValueError(f"{name}: wanted shape {(batch, width)}, got {tuple(t.shape)}")
    return states[0], states[1] if cell == "lstm" else None


def _check_integers(name: str, t, input) -> None:
    if not isinstance(t, torch.Tensor) or t.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: wanted an int32 or int64 tensor, got {getattr(t, 'dtype', type(t).__name__)}")
    if t.dim() != 1:
        raise ValueError(f"{name}: wanted 1 dimension, got shape {tuple(t.shape)}")
    _common.check_same(name, t, "input", input, dtype=False)


def _sequences(input, lengths, cu_seqlens, max_seqlen) -> tuple[torch.Tensor, int, bool]:
    """The spec's sequences, its steps, and whether positions lie between them."""
    device = input.device
    if cu_seqlens is not None:
        if input.dim() != 2:
            raise ValueError(f"input: wanted 2 dimensions (total, in) with cu_seqlens, got shape {tuple(input.shape)}")
        if lengths is not None:
            raise ValueError("lengths, cu_seqlens: wanted at most one of them, got both")
        _check_integers("cu_seqlens", cu_seqlens, input)
        if not len(cu_seqlens):
            raise ValueError("cu_seqlens: wanted at least one number, got none")
        ends = cu_seqlens.to(torch.int64)
        of_each = ends.diff()
        if _common.concrete(cu_seqlens) and not torch.compiler.is_compiling():
            total = input.shape[0]
            if int(ends[0]) != 0 or int(ends[-1]) != total or bool((of_each < 0).any()):
                raise ValueError(f"cu_seqlens: wanted numbers that rise from 0 to {total}, got {ends.tolist()}")
            longest = int(of_each.max()) if len(of_each) else 0
            if max_seqlen is None:
                max_seqlen = longest
            _common.check_integer("max_seqlen", max_seqlen, longest)
            max_seqlen = min(max_seqlen, total)
        elif max_seqlen is None:
            max_seqlen = input.shape[0]
        return torch.stack((ends[:-1], of_each, of_each.argsort(descending=True))), max_seqlen, False
    if max_seqlen is not None:
        raise ValueError(f"max_seqlen: wanted None without cu_seqlens, got {max_seqlen!r}")
    if input.dim() != 3:
        raise ValueError(f"input: wanted 3 dimensions (B, T, in), got shape {tuple(input.shape)}")
    batch, steps = input.shape[:2]
    place = torch.arange(batch, device=device)
    if lengths is None:
        return torch.stack((place * steps, torch.full_like(place, steps), place)), steps, False
    _check_integers("lengths", lengths, input)
    if lengths.shape[0] != batch:
        raise ValueError(f"lengths: wanted shape ({batch},), got {tuple(lengths.shape)}")
    if device.type == "cpu" and batch and _common.concrete(lengths) and not torch.compiler.is_compiling():
        low, high = (int(n) for n in torch.aminmax(lengths))
        if low < 0 or high > steps:
            raise ValueError(f"lengths: wanted values in [0, {steps}], got {low if low < 0 else high}")
    lengths = lengths.to(torch.int64)
    return torch.stack((place * steps, lengths, lengths.argsort(descending=True))), steps, True


def _run(cell, input, weight_ih, weight_hh, bias_ih, bias_hh, initial, lengths, cu_seqlens, max_seqlen, reverse):
    _common.check_floating("input", input)
    cast = _common.autocast_dtype(input.device)
    if cast is not None and input.dtype != torch.float64:
        input, weight_ih, weight_hh, bias_ih, bias_hh = (
            t.to(cast) if isinstance(t, torch.Tensor) and t.is_floating_point() else t
            for t in (input, weight_ih, weight_hh, bias_ih, bias_hh)
        )
        if isinstance(initial, torch.Tensor):
            initial = initial.to(cast)
        elif isinstance(initial, (tuple, list)):
            initial = tuple(t.to(cast) if isinstance(t, torch.Tensor) else t for t in initial)
    _common.check_flag("reverse", reverse)
    sequences, steps, gaps = _sequences(input, lengths, cu_seqlens, max_seqlen)
    _check_weights(cell, input, weight_ih, weight_hh, (("bias_ih", bias_ih), ("bias_hh", bias_hh)))
    width = weight_hh.shape[1]
    hidden, memory_ = _check_states(cell, initial, input, sequences.shape[1], width)
    if cell == "lstm" and bias_hh is not None:  # a GRU's reset gate stands between the two
        bias_ih, bias_hh = bias_hh if bias_ih is None else bias_ih + bias_hh, None
    rows = input.reshape(-1, input.shape[-1])
    own = rows.dtype == torch.float32 and not _common.transformed()  # in other dtypes torch's product is as fast
    gates = (linear if own else F.linear)(rows, weight_ih, bias_ih)
    tensors = (gates, weight_hh, bias_hh, hidden, memory_)
    if _common.transformed():
        found = eager_recurrence.recurrence(RecurrenceSpec(*tensors, sequences, steps, bool(reverse)))
    elif _common.direct(*tensors):
        found = _forward(*tensors, sequences, steps, bool(reverse), gaps, False)
    else:
        found = _op(*tensors, sequences, steps, bool(reverse), gaps, True)
    out, last, last_memory = found[:3]
    return out.view(*input.shape[:-1], width), last, last_memory


def lstm(
    input: torch.Tensor,
    weight_ih: torch.Tensor,
    weight_hh: torch.Tensor,
    bias_ih: torch.Tensor | None = None,
    bias_hh: torch.Tensor | None = None,
    initial: tuple[torch.Tensor, torch.Tensor] | None = None,
    *,
    lengths: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    reverse: bool = False,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """h_t = o * tanh(c_t),  c_t = f * c_(t-1) + i * g,  (i, f, g, o) = gates of W x_t + U h_(t-1) + b: one layer of an
    LSTM in one direction, all steps in one call. Weights as torch.nn.LSTM has them (weight_ih_l0, ...).

    Sums and states are float32 inside, and the gates are kept for the backward pass in float32; deterministic. Under
    autocast it runs in the dtype of autocast.

    Args:
        input: (B, T, I), or with cu_seqlens (total, I), sequences one after the other; float16, bfloat16 or float32
            (float64 in plain PyTorch).
        weight_ih: (4 * H, I), gates i, f, g, o; all weights have input's dtype.
        weight_hh: (4 * H, H).
        bias_ih: (4 * H,) or None.
        bias_hh: (4 * H,) or None; the two are added.
        initial: hidden state and memory before the first step, (B, H) each; None: zeros.
        lengths: (B,) int; positions from there on are not computed, and get zeros.
        cu_seqlens: (B + 1,) int: where each sequence begins, and the total.
        max_seqlen: of the sequences of cu_seqlens; None: found from them.
        reverse: from the last position of each sequence to its first.

    Returns:
        The hidden states, (B, T, H) or (total, H), and the last hidden state and memory, (B, H) each; of a sequence
        without positions those are the initial ones.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted.

    Source:
        Hochreiter and Schmidhuber, "Long Short-Term Memory", 1997; Gers, Schmidhuber and Cummins, "Learning to Forget",
        2000.

    Examples:
        >>> import torch, transformer_fast
        >>> x, w, u = torch.randn(2, 5, 8), torch.randn(64, 8), torch.randn(64, 16)
        >>> out, (hidden, memory) = transformer_fast.lstm(x, w, u, lengths=torch.tensor([5, 3]))
        >>> out.shape, hidden.shape
        (torch.Size([2, 5, 16]), torch.Size([2, 16]))
    """
    out, last, last_memory = _run(
        "lstm", input, weight_ih, weight_hh, bias_ih, bias_hh, initial, lengths, cu_seqlens, max_seqlen, reverse
    )
    return out, (last, last_memory)


def gru(
    input: torch.Tensor,
    weight_ih: torch.Tensor,
    weight_hh: torch.Tensor,
    bias_ih: torch.Tensor | None = None,
    bias_hh: torch.Tensor | None = None,
    initial: torch.Tensor | None = None,
    *,
    lengths: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    reverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """h_t = (1 - z) * n + z * h_(t-1),  n = tanh(W_n x_t + r * (U_n h_(t-1) + b_n)),  r, z sigmoids of W x_t +
    U h_(t-1) + b: one layer of a GRU in one direction, all steps in one call. Weights as torch.nn.GRU has them.

    Args:
        input: as of lstm.
        weight_ih: (3 * H, I), gates r, z, n; all weights have input's dtype.
        weight_hh: (3 * H, H).
        bias_ih: (3 * H,) or None.
        bias_hh: (3 * H,) or None; its part for n is multiplied by r.
        initial: the hidden state before the first step, (B, H); None: zeros.
        lengths: as of lstm.
        cu_seqlens: as of lstm.
        max_seqlen: as of lstm.
        reverse: as of lstm.

    Returns:
        The hidden states, (B, T, H) or (total, H), and the last one, (B, H).

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted.

    Source:
        Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder for Statistical Machine Translation",
        2014, with the reset gate after the product.

    Examples:
        >>> import torch, transformer_fast
        >>> x, w, u = torch.randn(2, 5, 8), torch.randn(48, 8), torch.randn(48, 16)
        >>> out, hidden = transformer_fast.gru(x, w, u, reverse=True)
        >>> torch.equal(out[:, 0], hidden)
        True
    """
    out, last, _ = _run(
        "gru", input, weight_ih, weight_hh, bias_ih, bias_hh, initial, lengths, cu_seqlens, max_seqlen, reverse
    )
    return out, last
