"""One direction of one LSTM layer over unpadded sequences, with optional projection and clipping."""

from typing import NamedTuple

import torch
from torch import nn

from .. import ops
from ..backends import Call, select

_FEWEST_STEPS = 4  # from this many steps on, converting a weight to panels pays off

__all__ = ["LSTM", "TokenOrder", "lstm", "order_tokens"]


class TokenOrder(NamedTuple):
    """The order of the tokens of a padded batch step after step, longest sequence first, as in torch's PackedSequence.

    The N tokens are numbered row after row of the batch. forward, backward: (N,) int64, the token at each place, for
    the two directions. steps: (T,) int64 on the CPU, the number of sequences with a token at each step. rows: (B',)
    int64, the batch row of each sequence, without rows that have no tokens. ends: (B + 1,) int64, the number of the
    first token of each batch row, and N.
    """

    forward: torch.Tensor
    backward: torch.Tensor
    steps: torch.Tensor
    rows: torch.Tensor
    ends: torch.Tensor

    @property
    def batch(self) -> int:
        return len(self.ends) - 1


def order_tokens(mask: torch.Tensor) -> TokenOrder:
    """The TokenOrder of a batch. mask: (B, T) bool, True for tokens; padding may be on either side. Synchronises
    once."""
    ops.parallel.refuse("a recurrent network", "run it on whole sequences")
    lengths = mask.sum(1)
    order = lengths.argsort(descending=True, stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=mask.device))
    rank = (mask.cumsum(1) - 1)[mask]
    row = mask.nonzero()[:, 0]
    forward = (rank * len(mask) + place[row]).argsort()
    backward = ((lengths[row] - 1 - rank) * len(mask) + place[row]).argsort()
    steps = torch.bincount(rank).cpu() if len(rank) else torch.zeros(0, dtype=torch.int64)
    ends = nn.functional.pad(lengths.cumsum(0), (1, 0))
    return TokenOrder(forward, backward, steps, order[: int(steps[0]) if len(steps) else 0], ends)


def lstm(
    x: torch.Tensor,
    order: TokenOrder,
    state: tuple[torch.Tensor, torch.Tensor],
    weight_ih: torch.Tensor,
    weight_hh: torch.Tensor,
    bias: torch.Tensor,
    weight_hr: torch.Tensor | None = None,
    cell_clip: float | None = None,
    projection_clip: float | None = None,
    backward: bool = False,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """c = clip(f * c + i * g), h = clip(W_hr (o * tanh(c))), with i, f, g, o of W_ih x + W_hh h + bias.

    x: (N, I), the tokens row after row of the batch. state: (h (B, P), c (B, C)) before the first token. weight_ih:
    (4C, I), weight_hh: (4C, P), bias: (4C,), gates in torch's order i, f, g, o. weight_hr: (P, C), or None if P = C.
    backward: run from the last token to the first. Returns h of every token, (N, P), and the last h and c of each row.
    Source: Hochreiter and Schmidhuber, 1997; Sak, Senior and Beaufays, 2014 (the projection).
    """
    if weight_hr is None and cell_clip is None and projection_clip is None and _is_fused(x, order, weight_hh):
        return ops.lstm(
            x, weight_ih, weight_hh, bias, None, state, cu_seqlens=order.ends, max_seqlen=len(order.steps),
            reverse=backward,
        )  # fmt: skip
    index = order.backward if backward else order.forward
    start = tuple(t.index_select(0, order.rows) for t in state)
    out, last = _by_steps(
        x.index_select(0, index), order.steps, start, weight_ih, weight_hh, bias, weight_hr, cell_clip, projection_clip
    )
    carried = tuple(s.index_copy(0, order.rows, t) for s, t in zip(state, last))
    return torch.zeros_like(out).index_copy(0, index, out), carried  # type: ignore[return-value]


def _is_fused(x: torch.Tensor, order: TokenOrder, weight: torch.Tensor) -> bool:
    """Whether the fused op has a kernel for the call and there are enough steps for its conversion of the weight."""
    if len(order.steps) < _FEWEST_STEPS:
        return False
    return select(Call("recurrence", x.device.type, x.dtype, weight.shape[1])).name != "eager"


def _by_steps(x, steps, state, weight_ih, weight_hh, bias, weight_hr, cell_clip, projection_clip):
    """x: (N, I), step after step; steps: (T,) rows per step; state: of the sequences that have tokens, longest
    first."""
    h, c = state
    if cell_clip is None and projection_clip is None:
        weights = [weight_ih, weight_hh, bias, torch.zeros_like(bias)] + ([] if weight_hr is None else [weight_hr])
        out, h, c = torch.lstm(x, steps, (h[None], c[None]), weights, True, 1, 0.0, False, False)
        return out, (h[0], c[0])
    # torch's cell has no clipping.
    inputs = ops.linear(x, weight_ih, bias)
    weight_hh, weight_hr = (_for_many_steps(w, len(steps)) for w in (weight_hh, weight_hr))  # type: ignore[assignment]
    outputs, last = [], []
    for gates in inputs.split(steps.tolist()):
        if len(gates) < len(h):  # the shortest sequences have ended
            last.append((h[len(gates) :], c[len(gates) :]))
            h, c = h[: len(gates)], c[: len(gates)]
        i, f, g, o = (gates + ops.linear(h, weight_hh)).chunk(4, -1)
        c = torch.addcmul(f.sigmoid() * c, i.sigmoid(), g.tanh())
        c = c if cell_clip is None else c.clamp(-cell_clip, cell_clip)
        h = o.sigmoid() * c.tanh()
        h = h if weight_hr is None else ops.linear(h, weight_hr)
        h = h if projection_clip is None else h.clamp(-projection_clip, projection_clip)
        outputs.append(h)
    last.append((h, c))
    h, c = (torch.cat(parts[::-1]) for parts in zip(*last))
    return torch.cat(outputs) if outputs else x.new_zeros(0, h.shape[1]), (h, c)


def _for_many_steps(weight: torch.Tensor | None, steps: int):
    """The weight, or a panel copy of it if there are enough steps and no gradient is needed."""
    if weight is None or weight.dtype != torch.float32 or weight.device.type != "cpu" or torch.is_grad_enabled():
        return weight
    return ops.to_panels(weight) if steps >= _FEWEST_STEPS and ops.concrete(weight) else weight


class LSTM(nn.Module):
    """The weights of one direction of one layer, with one bias, and its clipping limits."""

    def __init__(
        self,
        input_size: int,
        cell_size: int,
        projection_size: int | None = None,
        cell_clip: float | None = None,
        projection_clip: float | None = None,
    ):
        super().__init__()
        self.cell_size, self.output_size = cell_size, projection_size or cell_size
        self.cell_clip, self.projection_clip = cell_clip, projection_clip
        self.weight_ih = nn.Parameter(torch.empty(4 * cell_size, input_size))
        self.weight_hh = nn.Parameter(torch.empty(4 * cell_size, self.output_size))
        self.bias = nn.Parameter(torch.empty(4 * cell_size))
        self.weight_hr = nn.Parameter(torch.empty(projection_size, cell_size)) if projection_size else None

    def extra_repr(self) -> str:
        return f"{self.weight_ih.shape[1]}, {self.cell_size}, output_size={self.output_size}"

    def start(self, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The initial state (h (B, P), c (B, C)): zeros."""
        return self.bias.new_zeros(batch, self.output_size), self.bias.new_zeros(batch, self.cell_size)

    def forward(self, x: torch.Tensor, order: TokenOrder, backward: bool = False) -> torch.Tensor:
        """x: (N, I), the tokens row after row of the batch -> (N, P) in the same order."""
        return lstm(
            x, order, self.start(order.batch), self.weight_ih, self.weight_hh, self.bias, self.weight_hr,
            self.cell_clip, self.projection_clip, backward,
        )[0]  # fmt: skip
