"""Gradient of an attention bias that broadcasts: dS summed over the axes along which the bias has one element.

One program owns a tile of dbias and walks over everything that shares it (sequences, heads, blocks of rows or keys).
It computes dS again as the query kernel does, which adds 40% to a backward pass. No atomics, one order of sums. The
gradient of a bias that does not broadcast is written by the query kernel instead.

Proven by Triton's interpreter and by its compiled code, and run on an H200 (docs/gpu.md).
"""

import triton
import triton.language as tl

from .attention_common import (
    exponential,
    finish_scores,
    keep_tile,
    product,
    row_pointer,
    row_pointers,
    sequence,
    visible,
    whole_rows,
)


@triton.jit(
    do_not_specialize=[
        "stride_lse_b", "stride_lse_h", "heads", "queries", "keys", "window_left", "window_right", "reach",
        "threshold", "blocks_m", "blocks_n", "own_b", "own_h", "own_m", "own_n", "each_b", "each_h", "each_m", "each_n",
    ]
)  # fmt: skip
def _attention_backward_bias_kernel(
    q_ptr, k_ptr, v_ptr, grad_out_ptr, delta_ptr, peak_ptr, correction_ptr, dbias_ptr, cu_q_ptr, cu_k_ptr,
    key_lengths_ptr, bias_ptr, mask_ptr, relative_ptr, rng_ptr,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_gb, stride_gh, stride_gs, stride_lse_b, stride_lse_h,
    stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n,
    stride_split, stride_dbias_b, stride_dbias_h, stride_dbias_m, stride_dbias_n,
    own_b, own_h, own_m, own_n, each_b, each_h, each_m, each_n,
    heads, queries, keys, score_scale, softcap, window_left, window_right, reach, threshold, keep_scale,
    GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    SUM_M: tl.constexpr, SUM_N: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Program (tile, split). dbias has own_b x own_h x own_m x own_n tiles. Each sums each_b x each_h x each_m x each_n
    tiles of scores, divided among the splits. Along every axis own or each is 1."""
    tile = tl.program_id(0)
    own_n_block = tile % own_n
    own_m_block = tile // own_n % own_m
    own_head = tile // (own_n * own_m) % own_h
    own_sequence = tile // (own_n * own_m * own_h)
    count = each_b * each_h * each_m * each_n
    share = tl.cdiv(count, tl.num_programs(1))
    first = tl.program_id(1) * share
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for item in tl.range(first, tl.minimum(first + share, count)):
        n = own_n_block + item % each_n
        m = own_m_block + item // each_n % each_m
        h = own_head + item // (each_n * each_m) % each_h
        b = own_sequence + item // (each_n * each_m * each_h)
        first_q, first_k, length_q, length_k, offset = sequence(
            b, cu_q_ptr, cu_k_ptr, key_lengths_ptr, queries, keys, BOTTOM_RIGHT
        )
        first_row = m * BLOCK_M
        start = n * BLOCK_N
        nearest = start - (first_row + offset + BLOCK_M - 1)
        farthest = start + BLOCK_N - 1 - (first_row + offset)
        alive = (first_row < length_q) & (start < length_k)
        if RIGHT:
            alive = alive & (nearest <= window_right)
        if LEFT:
            alive = alive & (farthest >= -window_left)
        if alive:
            row = first_row + tl.arange(0, BLOCK_M)
            column = (start + tl.arange(0, BLOCK_N))[None, :]
            position = (row + offset)[:, None]
            head_q = row_pointer(q_ptr, b, h, first_q, stride_qb, stride_qh, stride_qs)
            head_grad = row_pointer(grad_out_ptr, b, h, first_q, stride_gb, stride_gh, stride_gs)
            head_k = row_pointer(k_ptr, b, h // GROUPS, first_k, stride_kb, stride_kh, stride_ks)
            head_v = row_pointer(v_ptr, b, h // GROUPS, first_k, stride_vb, stride_vh, stride_vs)
            place = row_pointer(row, b, h, first_q, stride_lse_b, stride_lse_h, 1)
            delta = tl.load(delta_ptr + place, mask=row < length_q, other=0.0)
            peak = tl.load(peak_ptr + place, mask=row < length_q, other=float("inf"))
            bias_row = tl.minimum(row, length_q - 1)[:, None]
            bias_rows = row_pointers(bias_ptr, b, h, bias_row, stride_bias_b, stride_bias_h, stride_bias_m)
            mask_rows = row_pointers(mask_ptr, b, h, bias_row, stride_mask_b, stride_mask_h, stride_mask_m)
            if relative_ptr is not None:
                relative_rows = relative_ptr + h * (2 * reach + 1)
            else:
                relative_rows = None
            q = whole_rows(head_q, first_row, stride_qs, length_q, BLOCK_M, HEAD_DIM, BLOCK_D, True, WIDE)
            k = whole_rows(head_k, start, stride_ks, length_k, BLOCK_N, HEAD_DIM, BLOCK_D, True, WIDE)
            scores = product(q, k, PRECISION)
            scores, _ = finish_scores(
                scores, position, column, length_k, score_scale, softcap, bias_rows, stride_bias_n, mask_rows,
                stride_mask_n, relative_rows, reach, None, SOFTCAP, PRECISION == "ieee", True,
            )  # fmt: skip
            seen = visible(position, column, length_k, window_left, window_right, LEFT, RIGHT)
            p = exponential(tl.where(seen, scores, float("-inf")), peak[:, None], False, PRECISION == "ieee")
            if correction_ptr is not None:
                p *= tl.load(correction_ptr + place, mask=row < length_q, other=0.0)[:, None]
            grad_out = whole_rows(head_grad, first_row, stride_gs, length_q, BLOCK_M, HEAD_DIM, BLOCK_D, True, WIDE)
            v = whole_rows(head_v, start, stride_vs, length_k, BLOCK_N, HEAD_DIM, BLOCK_D, True, WIDE)
            dp = product(grad_out, v, PRECISION)
            if rng_ptr is not None:
                keep = keep_tile(rng_ptr, b * heads + h, row, start, threshold, BLOCK_M, BLOCK_N, False)
                dp = tl.where(keep, dp * keep_scale, 0.0)
            acc += p * (dp - delta[:, None])
    ptr = dbias_ptr + tl.program_id(1).to(tl.int64) * stride_split
    ptr = row_pointer(ptr, own_sequence, own_head, 0, stride_dbias_b, stride_dbias_h, 0)
    row = own_m_block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = own_n_block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    if SUM_M and SUM_N:
        tl.store(ptr, tl.sum(acc))
    elif SUM_M:
        tl.store(ptr + column * stride_dbias_n, tl.sum(acc, 0), mask=column < keys)
    elif SUM_N:
        tl.store(ptr + row * stride_dbias_m, tl.sum(acc, 1), mask=row < queries)
    else:
        places = ptr + row[:, None] * stride_dbias_m + column[None, :] * stride_dbias_n
        tl.store(places, acc, mask=(row < queries)[:, None] & (column < keys)[None, :])
