"""Whether the sequence is spread over several processes: set by distributed.context_parallel, asked by every op that
looks along the sequence."""

from typing import Any, Protocol

import torch

__all__ = ["Spread", "current", "refuse", "set_current"]


class Spread(Protocol):
    """How processes share a sequence. Each holds a part of the same length of every tensor along it."""

    size: int

    def attend(self, spec: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """out and lse of an AttentionSpec whose tensors are this process's parts."""


# Process-wide, not of a thread: autograd runs a backward, and what checkpointing computes again, in threads of its own.
_current: Spread | None = None


def current() -> Spread | None:
    """The spread in use, None where every process has whole sequences."""
    return _current


def set_current(spread: Spread | None) -> Spread | None:
    """Put another in its place (None: none); returns the one before."""
    global _current
    before, _current = _current, spread
    return before


def refuse(what: str, instead: str) -> None:
    """Raise NotImplementedError where a sequence is spread: `what` would see this process's part of it alone."""
    if _current is not None and _current.size > 1:
        raise NotImplementedError(f"{what} sees one process's part of the sequence under context_parallel; {instead}")
