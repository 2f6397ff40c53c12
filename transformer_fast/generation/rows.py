"""Tracks which rows of a batch a stepper still decodes."""

from typing import Any

import torch

from .stepper import Stepper

__all__ = ["LiveRows"]


class LiveRows:
    """Drops finished rows from a stepper, and scatters its logits back to the whole batch.

    index: the batch row of each of the stepper's rows; None while they are the same. Finished rows get old logits or
    zeros, which are not used.
    """

    def __init__(self, stepper: Stepper, rows: int, *, fixed: bool = False):
        self.stepper, self.rows, self.fixed = stepper, rows, fixed
        self.index: torch.Tensor | None = None
        self._all: torch.Tensor | None = None
        self._place: torch.Tensor | None = None

    def drop(self, finished: torch.Tensor) -> None:
        """Drop finished rows, once they are a quarter of those that are computed. finished: (rows,) bool, equal within
        each block of beams."""
        if self.fixed or finished.device.type != "cpu":  # on a GPU this would synchronise in every step
            return
        now = finished if self.index is None else finished[self.index]
        count, live = len(now), int((~now).sum())
        if live == 0 or live * 4 > count * 3:
            return
        kept = torch.arange(live)
        holes = now[:live].nonzero().squeeze(1)
        kept[holes] = live + (~now[live:]).nonzero().squeeze(1)
        self.stepper.keep(kept)
        self.index = kept if self.index is None else self.index[kept]
        self._place = torch.zeros(self.rows, dtype=torch.long)
        self._place[self.index] = torch.arange(live)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits (rows, V) after tokens (rows,)."""
        if self.index is None:
            return self.stepper.step(tokens)
        logits = self.stepper.step(tokens[self.index])
        if self._all is None or self._all.dtype != logits.dtype:
            self._all = logits.new_zeros(self.rows, logits.shape[1])
        self._all[self.index] = logits
        return self._all

    def choose(self, tokens: torch.Tensor, barred: torch.Tensor | None) -> torch.Tensor | None:
        """The stepper's `choose`, scattered to the whole batch; finished rows get 0."""
        choose: Any = getattr(self.stepper, "choose", None)
        if choose is None:
            return None
        if self.index is None:
            return choose(tokens, barred)
        found = choose(tokens[self.index], barred)
        return None if found is None else torch.zeros_like(tokens).index_copy_(0, self.index, found)

    def rank(
        self, tokens: torch.Tensor, count: int, barred: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The stepper's rank over the whole batch, or None if it has none. What finished rows get is for nobody."""
        rank: Any = getattr(self.stepper, "rank", None)
        if rank is None:
            return None
        if self.index is None:
            return rank(tokens, count, barred)
        values, found = rank(tokens[self.index], count, barred)
        return (
            values.new_zeros(self.rows, count).index_copy_(0, self.index, values),
            found.new_zeros(self.rows, count).index_copy_(0, self.index, found),
        )

    def reorder(self, index: torch.Tensor) -> None:
        """Let row r continue from row index[r] of the same block of beams."""
        if self.index is not None:
            assert self._place is not None
            index = self._place[index[self.index]]
        self.stepper.reorder(index)
