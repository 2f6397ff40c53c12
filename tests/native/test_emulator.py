"""Tests of the emulator itself: each instruction against a plain model, and planted bugs that it must detect."""

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
    return torch.randn(shape).numpy()


def _whole(*shape, dtype=torch.float32):
    """Small integers, whose sums of products are exact in any order."""
    return torch.randint(-8, 9, shape).to(dtype)


def _new(*shape, dtype=np.float32):
    return np.full(shape, np.nan if dtype == np.float32 else 0x7FFF, dtype)


def _bits(t):
    return t.view(torch.int16).numpy().view(np.uint16)


def _pairs(lo, hi):
    """Registers of two 16-bit values."""
    return lo.astype(np.uint32) | hi.astype(np.uint32) << 16


@pytest.mark.quick
def test_block_sum(emulator):
    x, y = _whole(5, 1000).numpy(), _new(5)
    emulator.row_sum(x, y, True)
    np.testing.assert_array_equal(y, x.sum(1))


def test_shuffles(emulator):
    out = _new(6, 32, dtype=np.int32)
    emulator.shuffles(out)
    lane = np.arange(32)
    sources = [
        lane * 5 % 32,
        lane ^ 6,
        np.where(lane < 29, lane + 3, lane),
        np.where(lane > 2, lane - 3, lane),
        lane ^ 1,
    ]
    np.testing.assert_array_equal(out[:5], [100 * s + 7 for s in sources])
    assert set(out[5]) == {sum(1 << i for i in range(0, 32, 3))}


# PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type": the place of value i of a lane.
def _a_place(lane, i):
    row = lane // 4 + (8 if i in (2, 3, 6, 7) else 0)
    return row, lane % 4 * 2 + i % 2 + (8 if i >= 4 else 0)


def _b_place(lane, i):
    return lane % 4 * 2 + i % 2 + (8 if i >= 2 else 0), lane // 4


def _d_place(lane, i):
    return lane // 4 + (8 if i >= 2 else 0), lane % 4 * 2 + i % 2


def _fragment(values, place, count):
    """The fragment (32 lanes, count values) of a matrix."""
    return np.array([[values[place(lane, i)] for i in range(count)] for lane in range(32)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mma(emulator, dtype):
    a, b, c = _whole(16, 16, dtype=dtype), _whole(16, 8, dtype=dtype), _whole(16, 8)
    fa, fb = _fragment(_bits(a), _a_place, 8), _fragment(_bits(b), _b_place, 4)
    d = np.ascontiguousarray(_fragment(c.numpy(), _d_place, 4))
    emulator.mma(dtype == torch.float16, _pairs(fa[:, ::2], fa[:, 1::2]), _pairs(fb[:, ::2], fb[:, 1::2]), d)
    truth = (c.double() + a.double() @ b.double()).numpy()
    np.testing.assert_array_equal(d, _fragment(truth, _d_place, 4))


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_and_stmatrix(emulator, count, transposed):
    x = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    registers, back = _new(32, 4, dtype=np.uint32), _new(4, 8, 8, dtype=np.uint16)
    emulator.matrices(x, registers, back, count, transposed)
    m = x.transpose(0, 2, 1) if transposed else x
    # PTX ISA, "ldmatrix": thread t holds row t / 4, elements 2 * (t % 4) and the next.
    wanted = _pairs(m[:, :, ::2], m[:, :, 1::2]).reshape(4, 32).T
    np.testing.assert_array_equal(registers[:, :count], wanted[:, :count])
    np.testing.assert_array_equal(back[:count], x[:count])


@pytest.mark.parametrize("valid", [1024, 700, 0])
def test_cp_async(emulator, valid):
    x, y = _random(1024), _new(1024)
    emulator.copy(x[: max(valid, 4)].copy(), y, valid, 0)  # bytes that are not valid must not be read
    np.testing.assert_array_equal(y[:valid], x[:valid])
    np.testing.assert_array_equal(y[valid:], 0)


@pytest.mark.parametrize("bug", [1, 2, 3], ids=["no wait", "no commit", "no barrier"])
def test_planted_bugs_in_cp_async(bug):
    with cuda_emulator.active(late=True):
        x, y = _random(1024), _new(1024)
        if bug == 3:
            with pytest.raises(RuntimeError, match="race on shared memory"):
                cuda_emulator.library().copy(x, y, 1024, bug)
        else:
            cuda_emulator.library().copy(x, y, 1024, bug)
            assert np.isnan(y).any()


def _ring(emulator, name=""):
    a, b = _whole(128, 320, dtype=torch.bfloat16), _whole(160, 320, dtype=torch.bfloat16)
    c = _new(128, 160)
    getattr(emulator, f"ring_gemm{name}")(_bits(a), _bits(b), c)
    return c, (a.double() @ b.double().T).numpy()


@pytest.mark.quick
def test_ring_of_tma_and_wgmma(emulator):
    c, truth = _ring(emulator)
    np.testing.assert_array_equal(c, truth)


WGMMA = [
    "bf16_64_k_k_64",
    "f16_96_k_k_32",
    "f16_80_k_k_none",
    "bf16_128_k_t_64",
    "bf16_192_t_t_128",
    "f16_64_t_t_64",
    "bf16_48_t_t_32",
    "f16_32_t_t_none",
    "bf16_256_r_t_128",
    "f16_176_r_k_64",
]


@pytest.mark.parametrize("name", WGMMA)
def test_wgmma(emulator, name):
    """Operands along K ("k"), along M or N ("t"), in registers ("r"), under every swizzle."""
    kind, n, a_layout, b_layout, _ = name.split("_")
    dtype = torch.float16 if kind == "f16" else torch.bfloat16
    a, b, c = _whole(64, 32, dtype=dtype), _whole(int(n), 32, dtype=dtype), _new(64, int(n))
    registers = np.zeros((2, 4, 32, 4), np.uint32)
    for k in range(2):
        for warp in range(4):
            f = _fragment(_bits(a)[warp * 16 :, k * 16 :], _a_place, 8)
            registers[k, warp] = _pairs(f[:, ::2], f[:, 1::2])
    operands = [_bits((t.T if layout == "t" else t).contiguous()) for t, layout in ((a, a_layout), (b, b_layout))]
    getattr(emulator, f"wgmma_{name}")(*operands, registers, c)
    np.testing.assert_array_equal(c, (a.double() @ b.double().T).numpy())


@pytest.mark.parametrize("row, column", [(0, 0), (8, 64), (17, 96), (-3, -5), (40, 0)])
@pytest.mark.parametrize("add", [False, True])
def test_tma_boxes(emulator, row, column, add):
    x = torch.randn(20, 128).bfloat16()
    before = torch.randn(20, 128)
    raw, y, total = _new(8, 8, 8, dtype=np.uint16), _new(20, 128, dtype=np.uint16), before.numpy().copy()
    emulator.box(_bits(x), raw, y, total, row, column, add, 0)
    padded = torch.nn.functional.pad(x, (128, 128, 64, 64))  # zeros out of bounds
    box = _bits(padded[64 + row : 72 + row, 128 + column : 192 + column].contiguous()).reshape(8, 8, 8)
    # The 128-byte swizzle: chunk c of row r is at place c ^ r.
    for r in range(8):
        for chunk in range(8):
            np.testing.assert_array_equal(raw[r, chunk ^ r], box[r, chunk])
    inside = torch.zeros(20, 128, dtype=torch.bool)
    inside[max(row, 0) : max(row + 8, 0), max(column, 0) : column + 64] = True
    inside = inside.numpy()
    if add:
        np.testing.assert_array_equal(total[inside], (before + x.float()).numpy()[inside])
        np.testing.assert_array_equal(total[~inside], before.numpy()[~inside])
    else:
        np.testing.assert_array_equal(y[inside], _bits(x)[inside])
        assert (y[~inside] == 0x7FFF).all()


def test_bulk_copies_without_a_map(emulator):
    x, y = _random(3, 64), _random(3, 64)
    truth = x + y
    emulator.bulk(x, y)
    np.testing.assert_array_equal(y, truth)


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


@pytest.mark.parametrize("bug, message", [(1, "no fence_async_shared between"), (2, "exits before bulk_wait_read")])
def test_planted_bugs_in_stores(emulator, bug, message):
    x, raw, y, total = (_new(*s, dtype=np.uint16) for s in ((20, 128), (8, 64), (20, 128), (20, 128)))
    with pytest.raises(RuntimeError, match=message):
        emulator.box(x, raw, y, total.astype(np.float32), 0, 0, True, bug)


def test_dropped_barrier(emulator):
    with pytest.raises(RuntimeError, match="race on shared memory .* (read|written) by warp"):
        emulator.row_sum(_random(5, 1000), _new(5), False)


def test_writing_the_same_value_is_no_race(emulator):
    y = _new(64)
    emulator.twins(y)
    assert (y == 3).all()


FAULTS = [
    "global memory out of bounds: 4 bytes read",
    "global memory out of bounds: 4 bytes written",
    "for reading only",
    "misaligned access to global memory",
    "shared memory out of bounds: 4 bytes at offset",
    "divergent __syncthreads",
    "divergent __syncthreads.* exited",
    "divergent warp instruction",
    "divergent warp instruction",
    "deadlock.* named barrier 1",
    "arrives twice in one phase",
    r"deadlock.*\(spinning\)",
    "shuffle reads lane 31, which takes no part",
    "race on shared memory",
    "misaligned access to shared memory",
    "used by another thread before mbarrier_fence_init",
    "was overwritten",
    "ends with 16 bytes that were expected and did not come",
    "more arrivals than its count",
]


@pytest.mark.quick
@pytest.mark.parametrize("kind, message", enumerate(FAULTS))
def test_planted_faults(emulator, kind, message):
    with pytest.raises(RuntimeError, match=rf"kernel fault, grid \(1, 1, 1\), .*at block \(0, 0, 0\).*{message}"):
        emulator.fault(_random(64), _new(64), kind)
