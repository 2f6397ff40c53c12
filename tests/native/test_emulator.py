"""The emulator itself: each instruction against a plain model, and planted bugs, which must be caught."""

import cuda_emulator
import numpy as np
import pytest
import torch


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


def _bits(t):
    return t.view(torch.int16).numpy().view(np.uint16)


def _ring(emulator, name=""):
    a, b = torch.randn(128, 320).bfloat16(), torch.randn(160, 320).bfloat16()
    c = np.full((128, 160), np.nan, np.float32)
    getattr(emulator, f"ring_gemm{name}")(_bits(a), _bits(b), c)
    return c, (a.double() @ b.double().T).numpy()


@pytest.mark.quick
def test_ring_of_tma_and_wgmma(emulator):
    c, truth = _ring(emulator)
    np.testing.assert_allclose(c, truth, atol=1e-4)


@pytest.mark.parametrize(
    "bug, message",
    [
        ("no_wait", "race on shared memory"),
        ("wrong_parity", "race on shared memory|deadlock"),
        ("no_fence", "wgmma without warpgroup_fence"),
        ("no_commit", "warpgroup_commit has not closed"),
        ("wrong_swizzle", "into a swizzle atom"),
        ("unread", "race on shared memory|nobody waited for phase"),
        ("too_few_bytes", "deadlock|race on shared memory"),
    ],
)
def test_planted_bugs_in_the_ring(emulator, bug, message):
    with pytest.raises(RuntimeError, match=f"emulated CUDA kernel .*ring_gemm.*at block .*({message})"):
        _ring(emulator, f"_{bug}")


def test_dropped_barrier(emulator):
    with pytest.raises(RuntimeError, match="race on shared memory .* (read|written) by warp"):
        emulator.row_sum(_random(5, 1000), np.full(5, np.nan, np.float32), False)
