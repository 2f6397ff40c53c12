"""Tests of the C++ kernels of one instruction set."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from transformer_fast.backends import native


@contextmanager
def running_on(isa: str) -> Iterator[str]:
    """Run the block with the kernels of this instruction set; skip the test if the processor does not have it."""
    if native.load():
        pytest.skip(native.load())
    if isa not in native.supported_isas():
        pytest.skip(f"this processor has no {isa}")
    before = native.current_isa()
    native.set_isa(isa)
    try:
        yield isa
    finally:
        native.set_isa(before)
