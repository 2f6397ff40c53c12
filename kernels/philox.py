"""Counter-based dropout inside Triton kernels: the mask of ops/dropout.py and csrc/cpu/philox.hpp, bit for bit.

Element (bh, i, j) takes 16 of the 128 bits of one Philox4x32-7 counter (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011):

    counter = (16 * (j // 128) + j % 16,  i,  bh,  offset)        key = seed
    lane    = (j % 128) // 16              bits = word[lane % 4] >> (0 if lane < 4 else 16)

and is kept when bits >= threshold. One counter serves eight columns: a block of columns costs an eighth of
what a generator called once per element would.
"""

import triton
import triton.language as tl


@triton.jit
def _round(c0, c1, c2, c3, key0, key1):
    high0, low0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
    high1, low1 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
    return high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0


@triton.jit
def philox(c0, c1, c2, c3, key0, key1, UNROLLED: tl.constexpr = False):
    """The four words of Philox4x32-7 for counters (c0, c1, c2, c3), uint32 tensors of one shape.

    UNROLLED: for calls inside a loop that Triton should pipeline: it pipelines only innermost loops.
    """
    if UNROLLED:
        for _ in tl.static_range(7):
            c0, c1, c2, c3 = _round(c0, c1, c2, c3, key0, key1)
            key0 += 0x9E3779B9
            key1 += 0xBB67AE85
    else:
        # Without a loop Triton 3.6 computes everything again for each element, in the layout of the users.
        # (LLVM unrolls it.)
        for _ in range(7):
            c0, c1, c2, c3 = _round(c0, c1, c2, c3, key0, key1)
            key0 += 0x9E3779B9
            key1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def keep_mask(rng_ptr, bh, rows, first_column, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """True where dropout keeps element (bh, rows[r], first_column + c): int1 of shape [ROWS, COLUMNS].

    rng_ptr: {seed, offset} in int64. bh: scalar. rows: [ROWS]. first_column and COLUMNS: multiples of 128.
    """
    seed = tl.load(rng_ptr)
    zero = tl.zeros((ROWS, COLUMNS // 8), tl.uint32)
    # 16 * (j // 128) is j // 8 at a multiple of 128, so the counters of the block are consecutive.
    c0 = zero + (first_column // 8 + tl.arange(0, COLUMNS // 8))[None, :].to(tl.uint32)
    c1 = zero + rows[:, None].to(tl.uint32)
    c2 = zero + tl.cast(bh, tl.uint32)
    c3 = zero + tl.load(rng_ptr + 1).to(tl.uint32)
    w0, w1, w2, w3 = philox(c0, c1, c2, c3, seed.to(tl.uint32), (seed >> 32).to(tl.uint32))
    # The eight lanes of a counter as eight bits: a change of layout then moves one byte per eight elements.
    kept = ((w0 & 0xFFFF) >= threshold).to(tl.int32)
    kept |= ((w1 & 0xFFFF) >= threshold).to(tl.int32) << 1
    kept |= ((w2 & 0xFFFF) >= threshold).to(tl.int32) << 2
    kept |= ((w3 & 0xFFFF) >= threshold).to(tl.int32) << 3
    kept |= ((w0 >> 16) >= threshold).to(tl.int32) << 4
    kept |= ((w1 >> 16) >= threshold).to(tl.int32) << 5
    kept |= ((w2 >> 16) >= threshold).to(tl.int32) << 6
    kept |= ((w3 >> 16) >= threshold).to(tl.int32) << 7
    kept = tl.reshape(kept, (ROWS, COLUMNS // 128, 1, 16))
    lane = tl.arange(0, 8)[None, None, :, None]
    return tl.reshape(((kept >> lane) & 1) != 0, (ROWS, COLUMNS))
