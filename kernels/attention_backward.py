"""Attention, backward: P is computed again from the saved log-sum-exp, never stored (Dao, 2023).

    P = exp(score - lse)    dV = P^T dO    dP = dO V^T    delta = rowsum(dO * O) - dlse    dS = P * (dP - delta)
    dQ = scale * dS K       dK = scale * dS^T Q           dbias = dS    dtable[bucket] = sum of dS over its elements

The key kernel holds a block of keys and walks over the queries of every head that shares the key head (dK, dV). The
query kernel holds a block of queries and walks over the keys (dQ, the bias, the relative table). No atomics: every sum
has a fixed order, so gradients are bitwise reproducible. The cost: Q K^T and dO V^T are computed twice, seven matrix
products where a backward with atomic additions to dQ has five. Where the sums of a wide head do not fit the registers,
a program sums a slice of its columns and computes the scores itself.

delta from dO and O carries the rounding of O. It does not average away in rows of few keys, in gradients that sum dS
over whole rows (bias, relative table), or, with dropout, in rows where a mask or a bias leaves one key: O is then its
scaled value, rounded, not the value itself. Such calls compute delta = rowsum(P * dP) instead, in the query kernel with
DELTA: two more matrix products. In dQ an error e of delta becomes -e P K, per row a mean of the keys, which is large
where the keys have an offset, such as a projection's bias. But rows of dS sum to zero (or to dlse), so

    dQ = scale * sum_j dS_ij (k_j - center)

for any center. With the mean of the keys as center, the remaining error is as small as without an offset. The query
kernel sums the rows of dS and subtracts their product with the center once, at its end.

A float32 lse in the hundreds is rounded so coarsely that rows of P do not sum to one. Plain PyTorch subtracts the
largest score and has no such error. In float32 the query kernel with DELTA therefore measures the sums of such rows,
and `correction` divides by them.

Proven by Triton's interpreter and by its compiled code, and run on an H200 (docs/gpu.md).
"""

import triton
import triton.language as tl

from .attention_common import (
    LOG2E,
    PARTS,
    add_product,
    exponential,
    finish_scores,
    keep_tile,
    key_bounds,
    load_tile,
    near_keys,
    near_queries,
    own_columns,
    product,
    program_block,
    program_slice,
    query_bounds,
    row_pointer,
    row_pointers,
    sequence,
    store_tile,
    visible,
    whole_rows,
)

PRECISE_LSE = tl.constexpr(16.0)  # a larger float32 lse is rounded more coarsely than sums of P
CENTER_KEYS = tl.constexpr(1024)  # the center is the mean of at most this many keys, evenly spread


@triton.jit
def _center(k_ptr, stride_ks, keys, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Mean of the keys of a head. Values that are not finite count as zeros: a mask may hide them."""
    step = tl.maximum(tl.cdiv(keys, CENTER_KEYS), 1)
    count = tl.cdiv(keys, step)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in tl.range(0, count, ROWS):
        k = load_tile(k_ptr, start, tl.cast(stride_ks, tl.int64) * step, count, ROWS, HEAD_DIM, BLOCK_D, True, True)
        k = k.to(tl.float32)
        total += tl.sum(tl.where(tl.abs(k) < float("inf"), k, 0.0), 0)
    return total / tl.maximum(count, 1)


@triton.jit(do_not_specialize=["heads", "queries", "keys", "stride_lse_b", "stride_lse_h"])
def _attention_delta_kernel(
    out_ptr, grad_out_ptr, k_ptr, lse_ptr, grad_lse_ptr, delta_ptr, peak_ptr, correction_ptr, center_ptr, cu_q_ptr,
    cu_k_ptr, key_lengths_ptr,
    stride_ob, stride_oh, stride_os, stride_gb, stride_gh, stride_gs, stride_kb, stride_kh, stride_ks, stride_lse_b,
    stride_lse_h, heads, queries, keys,
    GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, FOLDED: tl.constexpr,
):  # fmt: skip
    """Write delta, and peak: lse in the units of scores, or +inf for a row with nothing to attend to, so that its P is
    zero. The correction starts as ones. The first program of each key head writes its center, (B, key heads, D)."""
    blocks = tl.cdiv(queries, BLOCK_M)  # all in grid axis 0: the other axes end at 65535
    bh = tl.program_id(0) // blocks
    b, h = bh // heads, bh % heads
    first_row = tl.program_id(0) % blocks * BLOCK_M
    first_q, first_k, queries, keys, _ = sequence(b, cu_q_ptr, cu_k_ptr, key_lengths_ptr, queries, keys, False)
    if first_row >= queries:
        return
    if (first_row == 0) & (h % GROUPS == 0):
        k_ptr = row_pointer(k_ptr, b, h // GROUPS, first_k, stride_kb, stride_kh, stride_ks)
        d = tl.arange(0, BLOCK_D)
        center = _center(k_ptr, stride_ks, keys, BLOCK_M, HEAD_DIM, BLOCK_D)
        head = b * (heads // GROUPS) + h // GROUPS
        tl.store(center_ptr + tl.cast(head, tl.int64) * HEAD_DIM + d, center, mask=d < HEAD_DIM)
    out_ptr = row_pointer(out_ptr, b, h, first_q, stride_ob, stride_oh, stride_os)
    grad_out_ptr = row_pointer(grad_out_ptr, b, h, first_q, stride_gb, stride_gh, stride_gs)
    out = load_tile(out_ptr, first_row, stride_os, queries, BLOCK_M, HEAD_DIM, BLOCK_D, True, True)
    grad_out = load_tile(grad_out_ptr, first_row, stride_gs, queries, BLOCK_M, HEAD_DIM, BLOCK_D, True, True)
    delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), 1)
    row = first_row + tl.arange(0, BLOCK_M)
    inside = row < queries
    place = row_pointer(row, b, h, first_q, stride_lse_b, stride_lse_h, 1)
    lse = tl.load(lse_ptr + place, mask=inside, other=0.0)
    if grad_lse_ptr is not None:
        delta -= tl.load(grad_lse_ptr + place, mask=inside, other=0.0)
    dead = lse == float("-inf")
    tl.store(delta_ptr + place, tl.where(dead, 0.0, delta), mask=inside)
    tl.store(peak_ptr + place, tl.where(dead, float("inf"), lse * LOG2E if FOLDED else lse), mask=inside)
    if correction_ptr is not None:
        tl.store(correction_ptr + place, tl.full((BLOCK_M,), 1.0, tl.float32), mask=inside)


@triton.jit
def _accumulate_key_gradients(
    dk, dv, tile, correction_ptr, rng_ptr, bias_ptr, mask_ptr, relative_rows, begin, end,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, FOLDED: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Add queries begin .. end, one of PARTS, to dK and dV of one tile of keys. Scores are [keys, queries]. Queries
    past the last have peak +inf, hence P = 0, and keys past the last are never stored: only windows need a mask."""
    (
        k, v, q_ptr, grad_out_ptr, delta_ptr, peak_ptr, first_column, first_d, b, h, bh, stride_qs,
        stride_gs, stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n, stride_mask_b, stride_mask_h,
        stride_mask_m, stride_mask_n, queries, keys, offset, score_scale, softcap, window_left, window_right, reach,
        threshold, keep_scale,
    ) = tile  # fmt: skip
    COLUMNS: tl.constexpr = 64 if PRECISION == "ieee" and HEAD_DIM > 128 else BLOCK_D  # see product
    EDGE: tl.constexpr = PART == 0 or PART == 4
    FAR: tl.constexpr = relative_rows is not None and (PART == 1 or PART == 3)
    # Rows before the near ones see these keys at distances beyond reach, rows after them beyond -reach.
    far_bias = tl.load(relative_rows + (3 - PART) // 2 * 2 * reach) if FAR else None
    column = (first_column + tl.arange(0, BLOCK_N))[:, None]
    for start in tl.range(begin, end, BLOCK_M):
        start = tl.multiple_of(start, BLOCK_M)
        row = start + tl.arange(0, BLOCK_M)
        position = (row + offset)[None, :]
        q = whole_rows(q_ptr, start, stride_qs, queries, BLOCK_M, HEAD_DIM, COLUMNS, EDGE, WIDE)
        if EDGE:
            peak = tl.load(peak_ptr + row, mask=row < queries, other=float("inf"))
            delta = tl.load(delta_ptr + row, mask=row < queries, other=0.0)
        else:
            peak = tl.load(peak_ptr + row)
            delta = tl.load(delta_ptr + row)
        scores = product(k, q, PRECISION)
        bias_row = tl.minimum(row, queries - 1)[None, :]
        bias_rows = row_pointers(bias_ptr, b, h, bias_row, stride_bias_b, stride_bias_h, stride_bias_m)
        mask_rows = row_pointers(mask_ptr, b, h, bias_row, stride_mask_b, stride_mask_h, stride_mask_m)
        scores, slope = finish_scores(
            scores, position, column, keys, score_scale, softcap, bias_rows, stride_bias_n, mask_rows, stride_mask_n,
            relative_rows, reach, far_bias, SOFTCAP, PRECISION == "ieee", True,
        )  # fmt: skip
        if EDGE and (LEFT or RIGHT):
            alive = visible(position, column, keys, window_left, window_right, LEFT, RIGHT)
            scores = tl.where(alive, scores, float("-inf"))
        p = exponential(scores, peak[None, :], FOLDED, PRECISION == "ieee")
        if correction_ptr is not None:
            p *= tl.load(correction_ptr + row, mask=row < queries, other=0.0)[None, :]
        grad_out = whole_rows(grad_out_ptr, start, stride_gs, queries, BLOCK_M, HEAD_DIM, COLUMNS, EDGE, WIDE)
        dp = product(v, grad_out, PRECISION)
        if rng_ptr is not None:
            keep = keep_tile(rng_ptr, bh, row, first_column, threshold, BLOCK_M, BLOCK_N, True)
            kept = tl.where(keep, p, 0.0)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        else:
            kept = p
        own = own_columns(
            grad_out, grad_out_ptr, start, stride_gs, queries, first_d, BLOCK_M, HEAD_DIM, BLOCK_D, EDGE, WIDE
        )
        dv = add_product(dv, kept.to(own.dtype), own, PRECISION)
        ds = p * (dp - delta[None, :])
        if SOFTCAP:
            ds = ds * slope
        own = own_columns(q, q_ptr, start, stride_qs, queries, first_d, BLOCK_M, HEAD_DIM, BLOCK_D, EDGE, WIDE)
        dk = add_product(dk, ds.to(own.dtype), own, PRECISION)
    return dk, dv


_UNSPECIALIZED = [
    "stride_lse_b", "stride_lse_h", "heads", "batch_heads", "blocks", "heads_together", "queries", "keys",
    "window_left", "window_right", "reach", "threshold",
]  # fmt: skip


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _attention_backward_key_kernel(
    q_ptr, k_ptr, v_ptr, grad_out_ptr, delta_ptr, peak_ptr, correction_ptr, dk_ptr, dv_ptr, cu_q_ptr, cu_k_ptr,
    key_lengths_ptr, bias_ptr, mask_ptr, relative_ptr, rng_ptr,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_gb, stride_gh, stride_gs, stride_dkb, stride_dkh, stride_dks, stride_dvb, stride_dvh, stride_dvs,
    stride_lse_b, stride_lse_h, stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n,
    heads, batch_heads, blocks, heads_together, queries, keys, score_scale, softcap, grad_scale, window_left,
    window_right, reach, threshold, keep_scale,
    GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, FOLDED: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write dK and dV. heads, batch_heads and heads_together count key heads. `keys` counts the rows of dK: those past
    key_lengths get zeros."""
    pid, first_d = program_slice(tl.program_id(0), HEAD_DIM, BLOCK_D)
    block, bh = program_block(pid, blocks, batch_heads, heads_together, False)
    b = bh // heads
    hk = bh % heads
    first_q, first_k, queries, stored, offset = sequence(b, cu_q_ptr, cu_k_ptr, None, queries, keys, BOTTOM_RIGHT)
    keys = stored
    if key_lengths_ptr is not None:
        _, _, _, keys, offset = sequence(b, None, None, key_lengths_ptr, queries, stored, BOTTOM_RIGHT)
    first_column = block * BLOCK_N
    if first_column >= stored:
        return
    k_ptr = row_pointer(k_ptr, b, hk, first_k, stride_kb, stride_kh, stride_ks)
    v_ptr = row_pointer(v_ptr, b, hk, first_k, stride_vb, stride_vh, stride_vs)
    COLUMNS: tl.constexpr = 64 if PRECISION == "ieee" and HEAD_DIM > 128 else BLOCK_D  # see product
    k = whole_rows(k_ptr, first_column, stride_ks, keys, BLOCK_N, HEAD_DIM, COLUMNS, True, True)
    v = whole_rows(v_ptr, first_column, stride_vs, keys, BLOCK_N, HEAD_DIM, COLUMNS, True, True)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    last = tl.minimum(first_column + BLOCK_N, keys) - 1
    begin, inner_begin, inner_end, end = query_bounds(
        first_column, last, queries, offset, window_left, window_right, LEFT, RIGHT, BLOCK_M
    )
    if first_column >= keys:
        inner_begin = begin
        inner_end = begin
        end = begin
    FAR: tl.constexpr = relative_ptr is not None and HEAD_DIM <= BLOCK_D  # see PARTS
    for g in tl.range(0, GROUPS):
        h = hk * GROUPS + g
        head_q = row_pointer(q_ptr, b, h, first_q, stride_qb, stride_qh, stride_qs)
        head_grad = row_pointer(grad_out_ptr, b, h, first_q, stride_gb, stride_gh, stride_gs)
        head_delta = row_pointer(delta_ptr, b, h, first_q, stride_lse_b, stride_lse_h, 1)
        head_peak = row_pointer(peak_ptr, b, h, first_q, stride_lse_b, stride_lse_h, 1)
        if correction_ptr is not None:
            head_correction = row_pointer(correction_ptr, b, h, first_q, stride_lse_b, stride_lse_h, 1)
        else:
            head_correction = None
        if relative_ptr is not None:
            relative_rows = relative_ptr + h * (2 * reach + 1)
        else:
            relative_rows = None
        near_begin = inner_begin
        near_end = inner_end
        if FAR:
            near_begin, near_end = near_queries(
                first_column, first_column + BLOCK_N - 1, inner_begin, inner_end, offset, reach, BLOCK_M
            )
        tile = (
            k, v, head_q, head_grad, head_delta, head_peak, first_column, first_d, b, h,
            b * (heads * GROUPS) + h, stride_qs, stride_gs, stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
            stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n, queries, keys, offset, score_scale, softcap,
            window_left, window_right, reach, threshold, keep_scale,
        )  # fmt: skip
        bounds = (begin, inner_begin, near_begin, near_end, inner_end, end)
        for part in tl.static_range(PARTS):
            if (part > 0 or RIGHT) and (part % 2 == 0 or FAR):
                dk, dv = _accumulate_key_gradients(
                    dk, dv, tile, head_correction, rng_ptr, bias_ptr, mask_ptr, relative_rows, bounds[part],
                    bounds[part + 1], BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D, LEFT, RIGHT, SOFTCAP, FOLDED, PRECISION,
                    WIDE, part,
                )  # fmt: skip
    if cu_k_ptr is not None:  # loaded again, volatile: values kept through the loops would cost registers
        first_k = tl.load(cu_k_ptr + b, volatile=True)
        stored = tl.load(cu_k_ptr + b + 1, volatile=True) - first_k
        if key_lengths_ptr is None:
            keys = stored
    dk_ptr = row_pointer(dk_ptr, b, hk, first_k, stride_dkb, stride_dkh, stride_dks)
    dv_ptr = row_pointer(dv_ptr, b, hk, first_k, stride_dvb, stride_dvh, stride_dvs)
    # Rows past `keys` hold the gradient of a key of zeros, which may be inf or NaN: write zeros.
    alive = (first_column + tl.arange(0, BLOCK_N) < keys)[:, None]
    dk = tl.where(alive, dk * grad_scale, 0.0)
    dv = tl.where(alive, dv * keep_scale, 0.0)
    store_tile(dk_ptr, first_column, stride_dks, stored, dk, BLOCK_N, HEAD_DIM, BLOCK_D, first_d)
    store_tile(dv_ptr, first_column, stride_dvs, stored, dv, BLOCK_N, HEAD_DIM, BLOCK_D, first_d)


@triton.jit
def _accumulate_query_gradient(
    dq, excess, weight, sums, tile, correction, rng_ptr, bias_rows, mask_rows, relative_rows, dbias_rows, bucket_ptr,
    begin, end,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, FOLDED: tl.constexpr,
    BUCKETS: tl.constexpr, DIAGONALS: tl.constexpr, QUERY: tl.constexpr, DELTA: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Add keys begin .. end, one of PARTS, to the gradients of one tile of queries: dQ, the row sums of dS (excess),
    dbias, with a soft cap the row sums of P * slope (weight), and with BUCKETS the sums of dS per bucket. With DELTA
    only to the row sums of P * dP (dq) and of P (excess)."""
    (
        q, grad_out, delta, peak, k_ptr, v_ptr, first_row, first_d, bh, stride_ks, stride_vs, stride_bias_n,
        stride_mask_n, stride_dbias_n, queries, keys, offset, score_scale, softcap, window_left, window_right, reach,
        threshold, keep_scale,
    ) = tile  # fmt: skip
    COLUMNS: tl.constexpr = 64 if PRECISION == "ieee" and HEAD_DIM > 128 else BLOCK_D  # see product
    EDGE: tl.constexpr = PART == 0 or PART == 4
    FAR: tl.constexpr = relative_rows is not None and (PART == 1 or PART == 3)
    far_bias = tl.load(relative_rows + PART // 2 * 2 * reach) if FAR else None
    far_sums = tl.zeros((BLOCK_M,), tl.float32)
    row = first_row + tl.arange(0, BLOCK_M)
    position = (row + offset)[:, None]
    for start in tl.range(begin, end, BLOCK_N):
        start = tl.multiple_of(start, BLOCK_N)
        column = (start + tl.arange(0, BLOCK_N))[None, :]
        k = whole_rows(k_ptr, start, stride_ks, keys, BLOCK_N, HEAD_DIM, COLUMNS, EDGE, WIDE)
        v = whole_rows(v_ptr, start, stride_vs, keys, BLOCK_N, HEAD_DIM, COLUMNS, EDGE, WIDE)
        scores = product(q, k, PRECISION)
        scores, slope = finish_scores(
            scores, position, column, keys, score_scale, softcap, bias_rows, stride_bias_n, mask_rows, stride_mask_n,
            relative_rows, reach, far_bias, SOFTCAP, PRECISION == "ieee", EDGE,
        )  # fmt: skip
        if EDGE:
            alive = visible(position, column, keys, window_left, window_right, LEFT, RIGHT)
            scores = tl.where(alive, scores, float("-inf"))
        p = exponential(scores, peak[:, None], FOLDED, PRECISION == "ieee")
        if correction is not None and not DELTA:
            p *= correction[:, None]
        dp = product(grad_out, v, PRECISION)
        if rng_ptr is not None:
            keep = keep_tile(rng_ptr, bh, row, start, threshold, BLOCK_M, BLOCK_N, False)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        if DELTA:
            dq += tl.sum(p * dp, 1)
            if correction is not None:
                excess += tl.sum(p, 1)
        else:
            ds = p * (dp - delta[:, None])
            if dbias_rows is not None:
                places = dbias_rows + column.to(tl.int64) * stride_dbias_n
                rows = tl.where(first_d == 0, queries, 0)  # only the first slice stores
                tl.store(places, ds, mask=(row < rows)[:, None] & (column < keys))
            if BUCKETS:
                if FAR:
                    far_sums += tl.sum(ds, 1)
                else:
                    nearest = start - (first_row + offset + BLOCK_M - 1)
                    sums += _bucket_sums(ds, nearest, bucket_ptr, reach, BLOCK_M, BLOCK_N, BUCKETS, DIAGONALS)
            if QUERY:
                excess += tl.sum(ds, 1)
            if SOFTCAP:
                ds = ds * slope
                if QUERY:
                    weight += tl.sum(p * slope, 1)
            if QUERY:
                own = own_columns(k, k_ptr, start, stride_ks, keys, first_d, BLOCK_N, HEAD_DIM, BLOCK_D, EDGE, WIDE)
                dq = add_product(dq, ds.to(own.dtype), own, PRECISION)
    if BUCKETS and FAR:
        far_bucket = tl.load(bucket_ptr + PART // 2 * 2 * reach)
        sums += tl.where(tl.arange(0, BUCKETS) == far_bucket, tl.sum(far_sums, 0), 0.0)
    return dq, excess, weight, sums


@triton.jit
def _bucket_sums(
    ds, nearest, bucket_ptr, reach, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BUCKETS: tl.constexpr,
    DIAGONALS: tl.constexpr,
):  # fmt: skip
    """Sums of a tile per bucket. Element (i, j) of a group of rows lies on diagonal j - i + ROWS - 1. Rows are shifted
    so that diagonals become columns; the column sums then take one comparison per bucket. A group has no more rows than
    columns: with more, most of the shifted tile would be empty."""
    ROWS: tl.constexpr = min(BLOCK_M, BLOCK_N)
    GROUPS: tl.constexpr = BLOCK_M // ROWS
    tile = tl.reshape(ds, (GROUPS, ROWS, BLOCK_N))
    diagonal = tl.arange(0, DIAGONALS)
    j = (diagonal[None, :] - (ROWS - 1) + tl.arange(0, ROWS)[:, None])[None, :, :]
    inside = (j >= 0) & (j < BLOCK_N)
    j = tl.broadcast_to(tl.minimum(tl.maximum(j, 0), BLOCK_N - 1), (GROUPS, ROWS, DIAGONALS))
    sums = tl.sum(tl.where(inside, tl.gather(tile, j, 2), 0.0), 1)
    first = nearest + BLOCK_M - ROWS - ROWS * tl.arange(0, GROUPS)
    distance = tl.minimum(tl.maximum(first[:, None] + diagonal[None, :], -reach), reach)
    bucket = tl.reshape(tl.load(bucket_ptr + (distance + reach)), (GROUPS * DIAGONALS,))
    sums = tl.reshape(sums, (GROUPS * DIAGONALS,))
    return tl.sum(tl.where(bucket[:, None] == tl.arange(0, BUCKETS)[None, :], sums[:, None], 0.0), 0)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _attention_backward_query_kernel(
    q_ptr, k_ptr, v_ptr, grad_out_ptr, grad_lse_ptr, delta_ptr, peak_ptr, correction_ptr, center_ptr, dq_ptr,
    dbias_ptr, bucket_sums_ptr, cu_q_ptr, cu_k_ptr, key_lengths_ptr, bias_ptr, mask_ptr, relative_ptr, bucket_ptr,
    rng_ptr,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_gb, stride_gh, stride_gs, stride_dqb, stride_dqh, stride_dqs, stride_lse_b, stride_lse_h,
    stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n,
    stride_dbias_b, stride_dbias_h, stride_dbias_m, stride_dbias_n,
    heads, batch_heads, blocks, heads_together, queries, keys, score_scale, softcap, grad_scale, window_left,
    window_right, reach, threshold, keep_scale,
    GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, FOLDED: tl.constexpr,
    BUCKETS: tl.constexpr, DIAGONALS: tl.constexpr, DELTA: tl.constexpr, LARGE: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Write dQ, dbias unless it broadcasts, and each program's sums of dS per bucket, (B, H, blocks, BUCKETS).

    DELTA: write only delta and the correction; LARGE: only for blocks where some lse exceeds PRECISE_LSE. Without
    dq_ptr: write only the sums; together with dQ they take too many registers at large head dims and with dropout.
    """
    QUERY: tl.constexpr = dq_ptr is not None
    pid = tl.program_id(0)
    first_d = 0
    if QUERY:  # only dQ is cut into slices of columns
        pid, first_d = program_slice(pid, HEAD_DIM, BLOCK_D)
    block, bh = program_block(pid, blocks, batch_heads, heads_together, RIGHT)
    b = bh // heads
    h = bh % heads
    first_q, first_k, queries, keys, offset = sequence(
        b, cu_q_ptr, cu_k_ptr, key_lengths_ptr, queries, keys, BOTTOM_RIGHT
    )
    first_row = block * BLOCK_M
    if first_row >= queries:
        return
    q_ptr = row_pointer(q_ptr, b, h, first_q, stride_qb, stride_qh, stride_qs)
    k_ptr = row_pointer(k_ptr, b, h // GROUPS, first_k, stride_kb, stride_kh, stride_ks)
    v_ptr = row_pointer(v_ptr, b, h // GROUPS, first_k, stride_vb, stride_vh, stride_vs)
    grad_out_ptr = row_pointer(grad_out_ptr, b, h, first_q, stride_gb, stride_gh, stride_gs)
    if QUERY:
        dq_ptr = row_pointer(dq_ptr, b, h, first_q, stride_dqb, stride_dqh, stride_dqs)
    row = first_row + tl.arange(0, BLOCK_M)
    inside = row < queries
    place = row_pointer(row, b, h, first_q, stride_lse_b, stride_lse_h, 1)
    delta = tl.load(delta_ptr + place, mask=inside, other=0.0)
    peak = tl.load(peak_ptr + place, mask=inside, other=float("inf"))
    if LARGE and tl.max(tl.where(peak == float("inf"), 0.0, tl.abs(peak)), 0) <= PRECISE_LSE:
        return
    correction = tl.load(correction_ptr + place, mask=inside, other=0.0) if correction_ptr is not None else None
    bias_row = tl.minimum(row, queries - 1)[:, None]
    bias_rows = row_pointers(bias_ptr, b, h, bias_row, stride_bias_b, stride_bias_h, stride_bias_m)
    mask_rows = row_pointers(mask_ptr, b, h, bias_row, stride_mask_b, stride_mask_h, stride_mask_m)
    dbias_rows = row_pointers(dbias_ptr, b, h, bias_row, stride_dbias_b, stride_dbias_h, stride_dbias_m)
    if relative_ptr is not None:
        relative_rows = relative_ptr + h * (2 * reach + 1)
    else:
        relative_rows = None

    COLUMNS: tl.constexpr = 64 if PRECISION == "ieee" and HEAD_DIM > 128 else BLOCK_D  # see product
    q = whole_rows(q_ptr, first_row, stride_qs, queries, BLOCK_M, HEAD_DIM, COLUMNS, True, True)
    grad_out = whole_rows(grad_out_ptr, first_row, stride_gs, queries, BLOCK_M, HEAD_DIM, COLUMNS, True, True)
    dq = tl.zeros((BLOCK_M, BLOCK_D) if QUERY else (BLOCK_M,), tl.float32)
    excess = tl.zeros((BLOCK_M,), tl.float32)
    weight = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BUCKETS if BUCKETS else 16,), tl.float32)
    last = tl.minimum(first_row + BLOCK_M, queries) - 1
    begin, inner_begin, inner_end, end = key_bounds(
        first_row + offset, last + offset, keys, window_left, window_right, LEFT, RIGHT, BLOCK_N
    )
    near_begin = inner_begin
    near_end = inner_end
    FAR: tl.constexpr = relative_ptr is not None and HEAD_DIM <= BLOCK_D  # see PARTS
    if FAR:
        near_begin, near_end = near_keys(
            first_row + offset, first_row + BLOCK_M - 1 + offset, inner_begin, inner_end, reach, BLOCK_N
        )
    tile = (
        q, grad_out, delta, peak, k_ptr, v_ptr, first_row, first_d, bh, stride_ks, stride_vs, stride_bias_n,
        stride_mask_n, stride_dbias_n, queries, keys, offset, score_scale, softcap, window_left, window_right, reach,
        threshold, keep_scale,
    )  # fmt: skip
    bounds = (begin, inner_begin, near_begin, near_end, inner_end, end)
    for part in tl.static_range(PARTS):
        if (part > 0 or LEFT) and (part % 2 == 0 or FAR):
            dq, excess, weight, sums = _accumulate_query_gradient(
                dq, excess, weight, sums, tile, correction, rng_ptr, bias_rows, mask_rows, relative_rows, dbias_rows,
                bucket_ptr, bounds[part], bounds[part + 1], BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D, LEFT, RIGHT, SOFTCAP,
                FOLDED, BUCKETS, DIAGONALS, QUERY, DELTA, PRECISION, WIDE, part,
            )  # fmt: skip
    if DELTA:
        if correction_ptr is not None:
            total = tl.where(excess > 0.0, excess, 1.0)
            dq /= total
            tl.store(correction_ptr + place, 1.0 / total, mask=inside)
        if grad_lse_ptr is not None:
            dq -= tl.load(grad_lse_ptr + place, mask=inside, other=0.0)
        dq = tl.where(peak == float("inf"), 0.0, dq)
        tl.store(delta_ptr + place, dq, mask=inside)
    if QUERY:
        if grad_lse_ptr is not None:
            excess -= tl.where(peak == float("inf"), 0.0, tl.load(grad_lse_ptr + place, mask=inside, other=0.0))
        if SOFTCAP:
            excess *= weight
        d = first_d + tl.arange(0, BLOCK_D)
        center_ptr += tl.cast(b * (heads // GROUPS) + h // GROUPS, tl.int64) * HEAD_DIM
        dq -= excess[:, None] * tl.load(center_ptr + d, mask=d < HEAD_DIM, other=0.0)[None, :]
        store_tile(dq_ptr, first_row, stride_dqs, queries, dq * grad_scale, BLOCK_M, HEAD_DIM, BLOCK_D, first_d)
    if BUCKETS:
        program = tl.cast(bh, tl.int64) * blocks + block
        tl.store(bucket_sums_ptr + program * BUCKETS + tl.arange(0, BUCKETS), sums)
