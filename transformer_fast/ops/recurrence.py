"""Recurrent layers: all steps of a GRU or an LSTM in one call forward and one call backward."""

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import PackedSequence

from ..backends import Backend, Call, eager_recurrence, memory, select
from ..backends.specs import RecurrenceSpec
from . import _common
from .linear import linear

_GATES = {"lstm": 4, "gru": 3}


def _select(spec: RecurrenceSpec) -> Backend:
    return select(Call("recurrence", spec.gates.device.type, spec.gates.dtype, spec.weight.shape[1]))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def _laid_out(spec: RecurrenceSpec) -> RecurrenceSpec:
    gates, before = spec.gates, spec.memory
    return spec._replace(
        gates=memory.unit_stride(gates), hidden=spec.hidden.contiguous(),
        memory=None if before is None else before.contiguous(),
    )  # fmt: skip


def _forward(*args) -> tuple[torch.Tensor, ...]:
    """args: a spec's fields, then `keep`. Returns out, the last hidden state, the last memory, and what the backward
    pass needs if `keep` is True: gates and memories. Results that do not apply are empty tensors. out is zero at
    positions that belong to no sequence."""
    *fields, keep = args
    spec = _laid_out(RecurrenceSpec(*fields))
    gates, hidden, before = spec.gates, spec.hidden, spec.memory
    (positions, _), width, dtype, device = gates.shape, spec.weight.shape[1], gates.dtype, gates.device
    out = memory.empty((positions, width), dtype, device)
    last = memory.empty(hidden.shape, dtype, device)
    last_memory = memory.empty(hidden.shape if before is not None else (0,), dtype, device)
    wide, rows = _wide(dtype), positions if keep else 0
    saved = memory.empty((rows, 4 * width), wide, device)
    memories = memory.empty((rows if before is not None else 0, width), wide, device)
    if spec.gaps:
        out.zero_()
    if positions and spec.steps and hidden.numel():
        lstm = before is not None
        _select(spec).recurrence_forward(
            spec, out, last, last_memory if lstm else None, saved if keep else None,
            memories if keep and lstm else None,
        )  # fmt: skip
    else:
        out.zero_()
        last.copy_(hidden)
        if before is not None:
            last_memory.copy_(before)
    return out, last, last_memory, saved, memories


def _forward_fake(*args):
    *fields, keep = args
    spec = RecurrenceSpec(*fields)
    gates, width, wide = spec.gates, spec.weight.shape[1], _wide(spec.gates.dtype)
    rows, lstm = gates.shape[0] if keep else 0, spec.memory is not None
    return (
        gates.new_empty((gates.shape[0], width)),
        gates.new_empty(spec.hidden.shape),
        gates.new_empty(spec.hidden.shape if lstm else (0,)),
        gates.new_empty((rows, 4 * width), dtype=wide),
        gates.new_empty((rows if lstm else 0, width), dtype=wide),
    )


def _backward_impl(grad_out, grad_last, grad_last_memory, out, saved, memories, *fields) -> tuple[torch.Tensor, ...]:
    """Gradients of gates, weight, bias, hidden and memory; empty for those that are None."""
    spec = _laid_out(RecurrenceSpec(*fields))
    shapes = [t.shape if t is not None else (0,) for t in spec[:5]]  # type: ignore[attr-defined]
    found = [memory.empty(shape, out.dtype, out.device) for shape in shapes]
    grads = [None if g is None else g.contiguous() for g in (grad_out, grad_last, grad_last_memory)]
    if spec.gaps or not spec.steps:
        found[0].zero_()
    if spec.gates.numel() and spec.steps and spec.hidden.numel():
        _select(spec).recurrence_backward(spec, grads, out, saved, memories, *found)
    else:
        found[1].zero_(), found[2].zero_()
        for buffer, grad in zip(found[3:], grads[1:]):
            buffer.zero_() if grad is None or not buffer.numel() else buffer.copy_(grad)
    return tuple(found)


def _backward_fake(grad_out, grad_last, grad_last_memory, out, saved, memories, *fields):
    return tuple(out.new_empty(t.shape if t is not None else (0,)) for t in fields[:5])


_SPEC = _common.schema_of(RecurrenceSpec)
_backward_op = _common.define(
    "recurrence_backward",
    "(Tensor? grad_out, Tensor? grad_last, Tensor? grad_last_memory, Tensor out, Tensor saved, Tensor memories, "
    f"{_SPEC}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)


def _setup(ctx, inputs, output):
    out, _, _, saved, memories = output
    _common.save(ctx, RecurrenceSpec(*inputs[:-1]), out, saved, memories)
    ctx.mark_non_differentiable(saved, memories)
    ctx.set_materialize_grads(False)


def _plain(spec: RecurrenceSpec) -> tuple[torch.Tensor, ...]:
    return eager_recurrence.recurrence(spec)[: 2 if spec.memory is None else 3]


def _backward(ctx, need, grad_out, grad_last, grad_last_memory, *_):
    spec, out, saved, memories = _common.saved(ctx)
    grads = (grad_out, grad_last, None if spec.memory is None else grad_last_memory)
    if all(g is None for g in grads):
        return {}
    fields = tuple(f for f in spec._fields[:5] if getattr(spec, f) is not None)
    if torch.is_grad_enabled():  # gradients of gradients
        return _common.gradients_of(_plain, spec, fields, grads[: 2 if spec.memory is None else 3])
    found = dict(zip(spec._fields, _backward_op(*grads, out, saved, memories, *spec)))
    return {f: found[f] for f in fields}


_op = _common.define(
    "recurrence",
    f"({_SPEC}, bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
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
    _common.check_integers(name, t)
    if t.dim() != 1:
        raise ValueError(f"{name}: wanted 1 dimension, got shape {tuple(t.shape)}")
    _common.check_same(name, t, "input", input, dtype=False)


def _sequences(input, lengths, cu_seqlens, max_seqlen) -> tuple[torch.Tensor, int, bool]:
    """The spec's `sequences`, `steps` and `gaps`."""
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
    if isinstance(input, PackedSequence):
        raise TypeError(
            "input: wanted a tensor, got PackedSequence, which stores step after step; pass concatenated sequences "
            "with cu_seqlens, or a padded batch with lengths"
        )
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
    if cell == "lstm" and bias_hh is not None:  # not for a GRU, whose reset gate multiplies only bias_hh
        bias_ih, bias_hh = bias_hh if bias_ih is None else bias_ih + bias_hh, None
    rows = input.reshape(-1, input.shape[-1])
    own = rows.dtype == torch.float32 and not _common.transformed()  # in other dtypes torch's product is as fast
    gates = (linear if own else F.linear)(rows, weight_ih, bias_ih)
    spec = RecurrenceSpec(gates, weight_hh, bias_hh, hidden, memory_, sequences, steps, bool(reverse), gaps)
    if _common.transformed():
        found = eager_recurrence.recurrence(spec)
    elif _common.direct(gates, weight_hh, bias_hh, hidden, memory_):
        found = _forward(*spec, False)
    else:
        found = _op(*spec, True)
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
    LSTM in one direction, with all steps in one call. Weights are laid out as in torch.nn.LSTM (weight_ih_l0, ...).

    Sums and states are float32 inside. The gates are saved for the backward pass in float32. Results are deterministic.
    Under autocast the op runs in autocast's dtype.

    Args:
        input: (B, T, I), or concatenated sequences (total, I) with cu_seqlens; float16, bfloat16 or float32 (float64 in
            plain PyTorch).
        weight_ih: (4 * H, I), gates i, f, g, o; all weights and biases have input's dtype.
        weight_hh: (4 * H, H).
        bias_ih: (4 * H,) or None.
        bias_hh: (4 * H,) or None; it is added to bias_ih.
        initial: hidden state and memory before the first step, (B, H) each; None: zeros.
        lengths: (B,) int32 or int64; positions at and after this are not computed, and their output is zero.
        cu_seqlens: (B + 1,) int32 or int64, cumulative lengths: the start of each sequence, and the total.
        max_seqlen: the length of the longest sequence in cu_seqlens; None: computed from cu_seqlens.
        reverse: run each sequence from its last position to its first.

    Returns:
        The hidden states, (B, T, H) or (total, H), and a tuple of the last hidden state and memory, (B, H) each. For a
        sequence of length 0 these are the initial ones.

    Raises:
        TypeError, ValueError: if an argument is invalid; the message names it, its value and what is expected.

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
    U h_(t-1) + b: one layer of a GRU in one direction, with all steps in one call. Weights are laid out as in
    torch.nn.GRU.

    Args:
        input: (B, T, I), or concatenated sequences (total, I) with cu_seqlens; as in lstm.
        weight_ih: (3 * H, I), gates r, z, n; all weights and biases have input's dtype.
        weight_hh: (3 * H, H).
        bias_ih: (3 * H,) or None.
        bias_hh: (3 * H,) or None; its part for n is multiplied by r.
        initial: the hidden state before the first step, (B, H); None: zeros.
        lengths: (B,) int32 or int64; positions at and after this are not computed, and their output is zero.
        cu_seqlens: (B + 1,) int32 or int64, cumulative lengths: the start of each sequence, and the total.
        max_seqlen: the length of the longest sequence in cu_seqlens; None: computed from cu_seqlens.
        reverse: run each sequence from its last position to its first.

    Returns:
        The hidden states, (B, T, H) or (total, H), and the last hidden state, (B, H).

    Raises:
        TypeError, ValueError: if an argument is invalid; the message names it, its value and what is expected.

    Source:
        Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder for Statistical Machine Translation",
        2014, with the reset gate applied after the product with U_n.

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
