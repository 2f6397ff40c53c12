"""Whether the sequence is split over several processes. distributed.context_parallel sets this, and every op that
works along the sequence checks it."""

from typing import Any, Protocol

import torch

__all__ = ["Spread", "current", "refuse", "set_current"]


class Spread(Protocol):
    """How processes share a sequence. Each holds a part of every tensor along it; all parts have the same length."""

    size: int

    def attend(self, spec: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """out and lse of this process's queries. The tensors of the AttentionSpec are this process's parts."""


# Process-wide, not thread-local: autograd runs the backward pass, and checkpointing its recomputation, in other
# threads.
_current: Spread | None = None


def current() -> Spread | None:
    """The active spread; None if every process has whole sequences."""
    return _current


def set_current(spread: Spread | None) -> Spread | None:
    """Make `spread` the active one (None: no spread). Returns the previous one."""
    global _current
    before, _current = _current, spread
    return before


def refuse(what: str, instead: str) -> None:
    """Raise NotImplementedError under context_parallel, where the op `what` would only see this process's part of the
    sequence. instead: advice for the message."""
    if _current is not None and _current.size > 1:
        raise NotImplementedError(f"{what} sees one process's part of the sequence under context_parallel; {instead}")
