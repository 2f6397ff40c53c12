"""Records the launches of Triton kernels instead of running them."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import triton_interpreter


class Launch(NamedTuple):
    kernel: str
    grid: tuple[int, ...]
    arguments: tuple
    options: dict


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """In this context `backend("triton")` accepts CPU tensors, and every launch is appended to the list it yields."""
    launches: list[Launch] = []

    def run(self, *arguments, grid, warmup=False, **options):
        size = grid(options) if callable(grid) else tuple(grid)
        assert 0 < size[0] < 2**31 and all(0 < n < 2**16 for n in size[1:]), f"{self.fn.__name__}: grid {size}"
        launches.append(Launch(self.fn.__name__, size, arguments, options))

    with triton_interpreter.active(), pytest.MonkeyPatch.context() as patch:
        from triton.runtime.interpreter import InterpretedFunction

        patch.setattr(InterpretedFunction, "run", run)
        yield launches
