"""What the attention kernels share: which keys a row sees, scores with every bias, dropout, tiles of memory.

FOLDED calls (float16 and bfloat16 without a bias, mask or soft cap) keep scores in units of log 2, so that scale and
change of base are one multiplication inside the exponent; the others keep natural units. Rows and columns come as
tensors that broadcast against a tile, so one function serves tiles of queries by keys and of keys by queries.
"""

import triton
import triton.language as tl

from .philox import philox

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def program_block(pid, blocks, batch_heads, heads_together, DESCENDING: tl.constexpr):
    """(block, b * heads + h) of a program. Programs go through `heads_together` heads block by block, so that their
    keys and values stay in the L2 cache. DESCENDING: the last block first, which is the longest in a causal call."""
    group = pid // (blocks * heads_together)
    size = tl.minimum(heads_together, batch_heads - group * heads_together)
    rest = pid - group * blocks * heads_together
    block = rest // size
    if DESCENDING:
        block = blocks - 1 - block
    return block, group * heads_together + rest % size


@triton.jit
def program_slice(pid, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """(program id without the slice, first column of the slice). Where the sums of a whole head dim do not fit the
    registers, a program sums BLOCK_D columns of the result. The program of each slice computes all scores again."""
    SLICES: tl.constexpr = (HEAD_DIM + BLOCK_D - 1) // BLOCK_D
    return pid // SLICES, pid % SLICES * BLOCK_D


@triton.jit
def sequence(b, cu_q_ptr, cu_k_ptr, key_lengths_ptr, queries, keys, BOTTOM_RIGHT: tl.constexpr):
    """(first row of q, first row of k, queries, keys, offset) of sequence b. First rows are 0 for padded tensors. Query
    i has position i + offset."""
    first_q = 0
    first_k = 0
    if cu_q_ptr is not None:
        first_q = tl.load(cu_q_ptr + b)
        first_k = tl.load(cu_k_ptr + b)
        queries = tl.load(cu_q_ptr + b + 1) - first_q
        keys = tl.load(cu_k_ptr + b + 1) - first_k
    if key_lengths_ptr is not None:
        keys = tl.minimum(tl.maximum(tl.load(key_lengths_ptr + b).to(tl.int32), 0), keys)
    offset = 0
    if BOTTOM_RIGHT:
        offset = keys - queries
    return first_q, first_k, queries, keys, offset


@triton.jit
def row_pointer(ptr, b, h, first_row, stride_b, stride_h, stride_s):
    """Row 0 of head h of sequence b; stride_b is 0 for unpadded tensors, first_row 0 for padded ones."""
    return ptr + (tl.cast(b, tl.int64) * stride_b + tl.cast(h, tl.int64) * stride_h
                  + tl.cast(first_row, tl.int64) * stride_s)  # fmt: skip


@triton.jit
def load_tile(
    ptr, first, stride, limit, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHECK: tl.constexpr,
    WIDE: tl.constexpr, first_d=0,
):  # fmt: skip
    """[ROWS, BLOCK_D] from row `first` and column first_d on of a matrix of HEAD_DIM columns; columns past HEAD_DIM are
    zeros. CHECK: rows from `limit` on are zeros and are not read. WIDE: offsets within the tile need 64 bits."""
    row = tl.arange(0, ROWS)
    d = first_d + tl.arange(0, BLOCK_D)
    offset = row.to(tl.int64) if WIDE else row
    pointers = ptr + tl.cast(first, tl.int64) * stride + (offset[:, None] * stride + d[None, :])
    if CHECK:
        inside = (first + row < limit)[:, None]
        if HEAD_DIM % BLOCK_D != 0:
            inside = inside & (d < HEAD_DIM)[None, :]
        tile = tl.load(pointers, mask=inside, other=0.0)
    elif HEAD_DIM % BLOCK_D != 0:
        tile = tl.load(pointers, mask=(d < HEAD_DIM)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def store_tile(
    ptr, first, stride, limit, tile, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, first_d=0
):  # fmt: skip
    row = first + tl.arange(0, ROWS)
    d = first_d + tl.arange(0, BLOCK_D)
    inside = (row < limit)[:, None]
    if HEAD_DIM % BLOCK_D != 0:
        inside = inside & (d < HEAD_DIM)[None, :]
    tl.store(ptr + row.to(tl.int64)[:, None] * stride + d[None, :], tile.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def whole_rows(
    ptr, first, stride, limit, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, CHECK: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Rows first .. first + ROWS as a tuple of tiles of COLUMNS columns, as `product` takes them."""
    rows = (load_tile(ptr, first, stride, limit, ROWS, HEAD_DIM, COLUMNS, CHECK, WIDE),)
    for s in tl.static_range(1, (HEAD_DIM + COLUMNS - 1) // COLUMNS):
        rows = rows + (load_tile(ptr, first, stride, limit, ROWS, HEAD_DIM, COLUMNS, CHECK, WIDE, s * COLUMNS),)
    return rows


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """A B^T; a and b come from `whole_rows`. A float32 product is a chain of additions, whose error grows with its
    length: in tiles of fewer columns the error is smaller, but several chains in flight take more registers."""
    c = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
    for s in tl.static_range(1, len(a)):
        c = add_product(c, a[s], tl.trans(b[s]), PRECISION)
    return c


@triton.jit
def add_product(sums, a, b, PRECISION: tl.constexpr):
    """sums + A B. In float32 A B is finished before it is added."""
    if PRECISION == "ieee":
        # As an fma, because the compiler would make one chain of a product and an addition.
        sums = tl.fma(tl.dot(a, b, input_precision=PRECISION), 1.0, sums)
    else:
        sums = tl.dot(a, b, sums, input_precision=PRECISION)
    return sums


@triton.jit
def own_columns(
    rows, ptr, first, stride, limit, first_d, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    CHECK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Columns first_d .. first_d + BLOCK_D of `whole_rows`: the operand for a program's slice of the result."""
    if len(rows) > 1:
        tile = load_tile(ptr, first, stride, limit, ROWS, HEAD_DIM, BLOCK_D, CHECK, WIDE, first_d)
    else:
        tile = rows[0]
    return tile


@triton.jit
def key_bounds(
    first, last, keys, window_left, window_right, LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """(begin, inner_begin, inner_end, end): positions first .. last see keys begin .. end, and every one of them sees
    all of inner_begin .. inner_end. begin <= inner_begin <= inner_end; all but end are multiples of BLOCK_N."""
    begin = 0
    end = keys
    inner_begin = 0
    inner_end = keys
    if RIGHT:
        end = tl.minimum(end, last + window_right + 1)
        inner_end = tl.minimum(inner_end, first + window_right + 1)
    if LEFT:
        begin = tl.maximum(first - window_left, 0) // BLOCK_N * BLOCK_N
        inner_begin = tl.cdiv(tl.maximum(last - window_left, 0), BLOCK_N) * BLOCK_N
    end = tl.maximum(end, begin)
    inner_begin = tl.minimum(inner_begin, tl.cdiv(end, BLOCK_N) * BLOCK_N)
    inner_end = tl.maximum(tl.maximum(inner_end, 0) // BLOCK_N * BLOCK_N, inner_begin)
    return begin, inner_begin, inner_end, end


@triton.jit
def query_bounds(
    first, last, queries, offset, window_left, window_right, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The mirror of key_bounds: which rows see keys first .. last, and which blocks of rows see all of them."""
    begin = 0
    end = queries
    inner_begin = 0
    inner_end = queries
    if RIGHT:
        begin = tl.maximum(first - window_right - offset, 0) // BLOCK_M * BLOCK_M
        inner_begin = tl.cdiv(tl.maximum(last - window_right - offset, 0), BLOCK_M) * BLOCK_M
    if LEFT:
        end = tl.minimum(end, last + window_left - offset + 1)
        inner_end = tl.minimum(inner_end, first + window_left - offset + 1)
    end = tl.maximum(end, begin)
    inner_begin = tl.minimum(inner_begin, tl.cdiv(end, BLOCK_M) * BLOCK_M)
    inner_end = tl.maximum(tl.maximum(inner_end, 0) // BLOCK_M * BLOCK_M, inner_begin)
    return begin, inner_begin, inner_end, end


# A tile of queries takes its keys in five parts, and a tile of keys its queries:
# left edge, distances beyond the reach of the relative bias, within it, beyond it on the other side, right edge.
# Where the head dim is cut into slices, all distances count as within: fewer loops leave more registers.
PARTS = tl.constexpr(5)


@triton.jit
def near_keys(first, last, inner_begin, inner_end, reach, BLOCK_N: tl.constexpr):
    """(near_begin, near_end) in the inner blocks of positions first .. last: keys before near_begin are at distances
    beyond -reach, keys from near_end on beyond reach."""
    near_begin = tl.maximum(first - reach + 1, 0) // BLOCK_N * BLOCK_N
    near_end = tl.cdiv(tl.maximum(last + reach, 0), BLOCK_N) * BLOCK_N
    near_begin = tl.minimum(tl.maximum(near_begin, inner_begin), inner_end)
    return near_begin, tl.minimum(tl.maximum(near_end, near_begin), inner_end)


@triton.jit
def near_queries(first, last, inner_begin, inner_end, offset, reach, BLOCK_M: tl.constexpr):
    """The mirror of near_keys for keys first .. last: rows before near_begin see them at distances beyond reach, rows
    from near_end on beyond -reach."""
    near_begin = tl.maximum(first - reach + 1 - offset, 0) // BLOCK_M * BLOCK_M
    near_end = tl.cdiv(tl.maximum(last + reach - offset, 0), BLOCK_M) * BLOCK_M
    near_begin = tl.minimum(tl.maximum(near_begin, inner_begin), inner_end)
    return near_begin, tl.minimum(tl.maximum(near_end, near_begin), inner_end)


@triton.jit
def visible(
    position, column, keys, window_left, window_right, LEFT: tl.constexpr, RIGHT: tl.constexpr
):  # fmt: skip
    """True for the elements of an edge tile that lengths and windows let take part."""
    alive = column < keys
    if RIGHT:
        alive = alive & (column <= position + window_right)
    if LEFT:
        alive = alive & (column >= position - window_left)
    return alive


@triton.jit
def _tanh(x, EXACT: tl.constexpr):
    """tanh by exp2; EXACT is accurate to float32. There 1 - 2 / (..) cancels for small arguments, which take a
    polynomial (Cephes, tanhf), and the rounding of 2 / (..) is coarse for negative ones, which take the sign last."""
    if EXACT:
        t = 1.0 - tl.div_rn(2.0, 1.0 + tl.exp2(tl.abs(x) * (2.0 * LOG2E)))
        t = tl.where(x < 0.0, -t, t)
        z = x * x
        series = -5.70498872745e-3 * z + 2.06390887954e-2
        series = series * z - 5.37397155531e-2
        series = series * z + 1.33314422036e-1
        series = series * z - 3.33332819422e-1
        t = tl.where(z < 0.390625, series * z * x + x, t)
    else:
        t = 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E)))
    return t


@triton.jit
def row_pointers(ptr, b, h, row, stride_b, stride_h, stride_m):
    """Pointers to the rows of a bias or mask, or None without one. `row` must lie within the tensor."""
    if ptr is not None:
        pointers = row_pointer(ptr, b, 0, 0, stride_b, 0, 0) + (
            tl.cast(h, tl.int64) * stride_h + row.to(tl.int64) * stride_m
        )
    else:
        pointers = None
    return pointers


@triton.jit
def finish_scores(
    raw, position, column, keys, score_scale, softcap, bias_rows, bias_stride, mask_rows, mask_stride, relative_rows,
    reach, far_bias,
    SOFTCAP: tl.constexpr, EXACT: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """(scores, derivative of the soft cap) from raw = q.k. Masked scores are -inf.

    position, column: of queries and keys, broadcast to raw's shape. bias_rows, mask_rows: likewise, see row_pointers.
    score_scale: scale, scale * log2(e) when FOLDED, scale / softcap with SOFTCAP. relative_rows: points at 2 * reach +
    1 values for distances -reach .. reach; distances beyond take the value at the end. far_bias: the one value of a
    tile that lies wholly beyond, in place of relative_rows. CHECK: columns may reach past `keys`.
    """
    slope = 1.0
    if SOFTCAP:
        t = _tanh(raw * score_scale, EXACT)
        slope = 1.0 - t * t
        scores = t * softcap
    else:
        scores = raw * score_scale
    if bias_rows is not None:
        pointers = bias_rows + column.to(tl.int64) * bias_stride
        bias = tl.load(pointers, mask=column < keys, other=0.0) if CHECK else tl.load(pointers)
        scores += bias.to(tl.float32)
    if far_bias is not None:
        scores += far_bias
    elif relative_rows is not None:
        distance = tl.minimum(tl.maximum(column - position, -reach), reach)
        scores += tl.load(relative_rows + (distance + reach))
    if mask_rows is not None:
        pointers = mask_rows + column.to(tl.int64) * mask_stride
        kept = tl.load(pointers, mask=column < keys, other=0) if CHECK else tl.load(pointers)
        scores = tl.where(kept != 0, scores, float("-inf"))
    return scores, slope


@triton.jit
def exponential(scores, shift, FOLDED: tl.constexpr, EXACT: tl.constexpr):
    """exp(scores - shift). EXACT subtracts before any product is rounded; only float32 needs it."""
    if FOLDED:
        p = tl.exp2(scores - shift)
    elif EXACT:
        p = tl.exp2((scores - shift) * LOG2E)
    else:
        p = tl.exp2(scores * LOG2E - shift * LOG2E)
    return p


@triton.jit
def _lanes(word, threshold, lane: tl.constexpr):
    low = ((word & 0xFFFF) >= threshold).to(tl.int32) << lane
    return low | (((word >> 16) >= threshold).to(tl.int32) << (lane + 4))


@triton.jit
def keep_tile(
    rng_ptr, bh, rows, first_column, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TRANSPOSED: tl.constexpr
):  # fmt: skip
    """True where dropout keeps element (bh, rows[r], first_column + c), [ROWS, COLUMNS] or transposed; see philox.py.

    COLUMNS: a power of two >= 16 that divides first_column. A tile narrower than 128 columns uses COLUMNS / 16 of the
    eight lanes of each counter.
    """
    GROUPS: tl.constexpr = (COLUMNS + 127) // 128
    LANES: tl.constexpr = COLUMNS // (16 * GROUPS)
    counter = (first_column // 128 * 16 + tl.arange(0, 16 * GROUPS)).to(tl.uint32)
    row = rows.to(tl.uint32)
    if TRANSPOSED:
        zero = tl.zeros((16 * GROUPS, ROWS), tl.uint32)
        c0 = zero + counter[:, None]
        c1 = zero + row[None, :]
    else:
        zero = tl.zeros((ROWS, 16 * GROUPS), tl.uint32)
        c0 = zero + counter[None, :]
        c1 = zero + row[:, None]
    seed = tl.load(rng_ptr)
    c2 = zero + tl.cast(bh, tl.uint32)
    c3 = zero + tl.load(rng_ptr + 1).to(tl.uint32)
    w0, w1, w2, w3 = philox(c0, c1, c2, c3, seed.to(tl.uint32), (seed >> 32).to(tl.uint32), True)
    kept = _lanes(w0, threshold, 0) | _lanes(w1, threshold, 1) | _lanes(w2, threshold, 2) | _lanes(w3, threshold, 3)
    lane = first_column % 128 // 16 + tl.arange(0, LANES)
    if TRANSPOSED:
        kept = tl.reshape(kept, (GROUPS, 1, 16, ROWS)) >> lane[None, :, None, None]
        keep = tl.reshape((kept & 1) != 0, (COLUMNS, ROWS))
    else:
        kept = tl.reshape(kept, (ROWS, GROUPS, 1, 16)) >> lane[None, None, :, None]
        keep = tl.reshape((kept & 1) != 0, (ROWS, COLUMNS))
    return keep
