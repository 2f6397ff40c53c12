"""Defines a benchmark case: one piece of work, the candidates that can do it, and the bar to reach."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

__all__ = ["OURS", "Bar", "Candidate", "Case", "Part", "Unavailable", "everything", "missing"]

OURS = "transformer_fast"

Call = Callable[[], Any]


def everything(output: Any, inputs: Any) -> Any:
    return output


class Unavailable(RuntimeError):
    """A candidate cannot run here. The message is the reason, and becomes the note of its row."""


@dataclass(frozen=True)
class Candidate:
    """One way to do a case's work.

    prepare(inputs) builds what it needs (model, compiled graph, weights in panels) and returns the call to time.
    requires: modules that must be importable. slow: takes long to prepare, left out of quick runs. settle: how many
    seconds its own worker threads keep spinning after a call. comparable: the output has the peer's shape and order.
    works_on: device types. low_precision: its output differs by more than rounding; the note of its row has the cosine
    of its rows to the peer's.
    """

    name: str
    prepare: Callable[[Any], Call]
    requires: tuple[str, ...] = ()
    slow: bool = False
    settle: float = 0.0
    comparable: bool = True
    works_on: tuple[str, ...] = ("cpu", "cuda")
    low_precision: bool = False


@dataclass(frozen=True)
class Bar:
    """What OURS must reach: a speed-up over the case's peer, or at most `microseconds` more time than it.

    ahead_of: candidates that must not be faster, if they are installed. ceiling: the least share of the machine's peak
    rate.
    """

    speedup: float | None = None
    microseconds: float | None = None
    ahead_of: tuple[str, ...] = ()
    ceiling: float | None = None

    def __str__(self) -> str:
        if self.microseconds is not None:
            return f"<= {self.microseconds:g} us more"
        text = f">= {self.speedup:g}x" + (", ahead of all others" if self.ahead_of else "")
        return text + (f", {self.ceiling:.0%} of the ceiling" if self.ceiling else "")


class Part(NamedTuple):
    """A part of a case's work that starts when the part before it has finished.

    flops: of its matrix products. read: bytes of the weights that it reads.
    """

    flops: float
    read: float


@dataclass(frozen=True)
class Case:
    """name is "group/what". inputs(tiny) makes the inputs, or small ones of the same kind, used to load code.

    peer: the candidate that ratios refer to. result(output, inputs) selects the tensors that must be equal for all
    candidates; None where they may differ (dropout). flops, bytes: of the work itself, reading and writing everything
    once; 0 where they mean nothing. parts(inputs): the work in parts that run one after the other, or None.
    """

    name: str
    inputs: Callable[[bool], Any]
    candidates: tuple[Candidate, ...]
    peer: str
    dtype: str
    shape: str
    title: str = ""
    flops: float = 0.0
    bytes: float = 0.0
    parts: Callable[[Any], list[Part]] | None = None
    bar: Bar | None = None
    result: Callable[[Any, Any], Any] | None = everything
    memory: bool = True

    @property
    def group(self) -> str:
        return self.name.split("/")[0]

    def candidate(self, name: str) -> Candidate:
        return next(c for c in self.candidates if c.name == name)


def missing(candidate: Candidate, device: str) -> str:
    """Why a candidate cannot run here, or ''."""
    if device not in candidate.works_on:
        return f"does not run on {device}"
    absent = [name for name in candidate.requires if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else ""
