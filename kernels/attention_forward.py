"""Attention, forward: one program per block of queries, an online softmax over blocks of keys (Dao, 2023).

    out = softmax(score) V      score = softcap(scale * Q K^T) + bias + relative bias      lse = log sum exp(score)

Blocks of keys that no row of the block sees are never visited. Those that every row sees in full run in a loop
without any mask; only the edges (causal diagonal, window ends, the last keys) pay for masks.

Proven by Triton's interpreter and by its compiled code, and run on an H200 (docs/gpu.md).
"""

import triton
import triton.language as tl

from .attention_common import (
    LN2,
    PARTS,
    add_product,
    exponential,
    finish_scores,
    keep_tile,
    key_bounds,
    load_tile,
    near_keys,
    product,
    program_block,
    program_slice,
    row_pointer,
    row_pointers,
    sequence,
    store_tile,
    visible,
    whole_rows,
)


@triton.jit
def _attend(
    acc, total, peak, tile, rng_ptr, bias_rows, mask_rows, relative_rows, begin, end,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, FOLDED: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Add keys begin .. end, one of PARTS, to the state of one tile of queries. peak: largest score so far, total: sum
    of exp(score - peak), acc: sum of exp(score - peak) V."""
    (
        q, k_ptr, v_ptr, first_row, first_d, bh, stride_ks, stride_vs, stride_bias_n, stride_mask_n, keys, offset,
        score_scale, softcap, window_left, window_right, reach, threshold,
    ) = tile  # fmt: skip
    EXACT: tl.constexpr = PRECISION == "ieee"
    COLUMNS: tl.constexpr = 64 if PRECISION == "ieee" and BLOCK_D > 64 else BLOCK_D  # see product
    EDGE: tl.constexpr = PART == 0 or PART == 4
    FAR: tl.constexpr = relative_rows is not None and (PART == 1 or PART == 3)
    far_bias = tl.load(relative_rows + PART // 2 * 2 * reach) if FAR else None
    row = first_row + tl.arange(0, BLOCK_M)
    position = (row + offset)[:, None]
    for start in tl.range(begin, end, BLOCK_N):
        start = tl.multiple_of(start, BLOCK_N)
        column = (start + tl.arange(0, BLOCK_N))[None, :]
        k = whole_rows(k_ptr, start, stride_ks, keys, BLOCK_N, HEAD_DIM, COLUMNS, EDGE, WIDE)
        scores = product(q, k, PRECISION)
        if not FOLDED:
            scores, _ = finish_scores(
                scores, position, column, keys, score_scale, softcap, bias_rows, stride_bias_n, mask_rows,
                stride_mask_n, relative_rows, reach, far_bias, SOFTCAP, EXACT, EDGE,
            )  # fmt: skip
        if EDGE:
            alive = visible(position, column, keys, window_left, window_right, LEFT, RIGHT)
            scores = tl.where(alive, scores, float("-inf"))
        if FOLDED:
            new_peak = tl.maximum(peak, tl.max(scores, 1) * score_scale)
        else:
            new_peak = tl.maximum(peak, tl.max(scores, 1))
        shift = new_peak
        if EDGE or bias_rows is not None or mask_rows is not None:
            # A row that has seen no key yet: exp2(-inf - 0) is 0, exp2(-inf + inf) would be NaN.
            shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        if FOLDED:
            scores = scores * score_scale
        p = exponential(scores, shift[:, None], FOLDED, EXACT)
        decay = exponential(peak, shift, FOLDED, EXACT)
        total = total * decay + tl.sum(p, 1)
        acc = acc * decay[:, None]
        if rng_ptr is not None:
            p = tl.where(keep_tile(rng_ptr, bh, row, start, threshold, BLOCK_M, BLOCK_N, False), p, 0.0)
        v = load_tile(v_ptr, start, stride_vs, keys, BLOCK_N, HEAD_DIM, BLOCK_D, EDGE, WIDE, first_d)
        acc = add_product(acc, p.to(v.dtype), v, PRECISION)
        peak = new_peak
    return acc, total, peak


@triton.jit(
    do_not_specialize=[
        "stride_lse_b", "stride_lse_h", "heads", "batch_heads", "blocks", "heads_together", "queries", "keys",
        "window_left", "window_right", "reach", "threshold",
    ]
)  # fmt: skip
def _attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, cu_q_ptr, cu_k_ptr, key_lengths_ptr, bias_ptr, mask_ptr, relative_ptr,
    rng_ptr,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_ob, stride_oh, stride_os, stride_lse_b, stride_lse_h,
    stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n,
    heads, batch_heads, blocks, heads_together, queries, keys, score_scale, softcap, window_left, window_right, reach,
    threshold, keep_scale,
    GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    FOLDED: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    pid, first_d = program_slice(tl.program_id(0), HEAD_DIM, BLOCK_D)
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
    out_ptr = row_pointer(out_ptr, b, h, first_q, stride_ob, stride_oh, stride_os)
    lse_ptr = row_pointer(lse_ptr, b, h, first_q, stride_lse_b, stride_lse_h, 1)
    row = first_row + tl.arange(0, BLOCK_M)
    bias_row = tl.minimum(row, queries - 1)[:, None]
    bias_rows = row_pointers(bias_ptr, b, h, bias_row, stride_bias_b, stride_bias_h, stride_bias_m)
    mask_rows = row_pointers(mask_ptr, b, h, bias_row, stride_mask_b, stride_mask_h, stride_mask_m)
    if relative_ptr is not None:
        relative_rows = relative_ptr + h * (2 * reach + 1)
    else:
        relative_rows = None

    COLUMNS: tl.constexpr = 64 if PRECISION == "ieee" and BLOCK_D > 64 else BLOCK_D  # see product
    q = whole_rows(q_ptr, first_row, stride_qs, queries, BLOCK_M, HEAD_DIM, COLUMNS, True, True)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
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
        q, k_ptr, v_ptr, first_row, first_d, bh, stride_ks, stride_vs, stride_bias_n, stride_mask_n, keys, offset,
        score_scale, softcap, window_left, window_right, reach, threshold,
    )  # fmt: skip
    bounds = (begin, inner_begin, near_begin, near_end, inner_end, end)
    for part in tl.static_range(PARTS):
        if (part > 0 or LEFT) and (part % 2 == 0 or FAR):
            acc, total, peak = _attend(
                acc, total, peak, tile, rng_ptr, bias_rows, mask_rows, relative_rows, bounds[part], bounds[part + 1],
                BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D, LEFT, RIGHT, SOFTCAP, FOLDED, PRECISION, WIDE, part,
            )  # fmt: skip

    dead = total == 0.0  # a row with nothing to attend to; a row of NaN is not dead
    factor = tl.where(dead, 0.0, keep_scale / total)
    store_tile(out_ptr, first_row, stride_os, queries, acc * factor[:, None], BLOCK_M, HEAD_DIM, BLOCK_D, first_d)
    lse = (peak + tl.log2(total)) * LN2 if FOLDED else peak + tl.log2(total) * LN2
    lse = tl.where(dead, float("-inf"), lse)
    tl.store(lse_ptr + row, lse, mask=row < tl.where(first_d == 0, queries, 0))  # only the first slice
