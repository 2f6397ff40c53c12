"""The emulator itself: each instruction against a plain model, and planted bugs, which must be caught."""

import cuda_emulator
import numpy as np
import pytest


@pytest.fixture(params=[(True, 0), (True, 7), (False, 1)], ids=["late", "late-other-order", "at-once"])
def emulator(request):
    late, seed = request.param
    with cuda_emulator.active(late=late, seed=seed):
        yield cuda_emulator.library()


def _random(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.quick
def test_block_sum(emulator):
    x, y = _random(5, 1000), np.full(5, np.nan, np.float32)
    emulator.row_sum(x, y, True)
    np.testing.assert_allclose(y, x.sum(1, dtype=np.float64), atol=1e-4)


def test_dropped_barrier(emulator):
    x, y = _random(5, 1000), np.full(5, np.nan, np.float32)
    emulator.row_sum(x, y, False)
    assert np.isnan(y).any()
