"""Tests of the C++ kernels of one instruction set."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from transformer_fast.backends import native


@contextmanager
def running_on(isa: str) -> Iterator[str]:
    """Inside, the kernels of this instruction set run; skips the test where they cannot."""
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
