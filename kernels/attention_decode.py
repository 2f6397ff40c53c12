"""Attention of a few queries against many keys (decoding): programs split the keys, then their parts are joined.

The query heads that share a key head, and their few queries, are the rows of one tile, so keys and values are read
once. Where sequences and key heads alone fill the GPU there is one split and one kernel; else each split writes its
part of the output and its log-sum-exp, and a second kernel joins them (Dao et al., "Flash-Decoding", 2023).

A call may pass new keys and values, one of each per query. The program that reaches their places at the end of the
cache reads them from the passed tensors and writes them to the cache. So the append takes no launch, and no program
reads what another has yet to write.

Proven by Triton's interpreter and by its compiled code, and run on an H200 (docs/gpu.md).
"""

import triton
import triton.language as tl

from .attention_common import (
    LN2,
    LOG2E,
    add_product,
    exponential,
    finish_scores,
    key_bounds,
    load_tile,
    product,
    row_pointer,
    row_pointers,
    sequence,
    visible,
    whole_rows,
)

TAIL = tl.constexpr(16)  # keys per tile at the cache's end, where new ones are: few, to save registers


@triton.jit
def _new_rows(tile, cache_ptr, new_ptr, start, stored, keys, stride, stride_new, BLOCK_N: tl.constexpr,
              HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, first_d=0):  # fmt: skip
    """`tile` of the cache with rows stored .. keys read from new_ptr, which are also written to the cache."""
    row = start + tl.arange(0, BLOCK_N)
    d = first_d + tl.arange(0, BLOCK_D)
    new = ((row >= stored) & (row < keys))[:, None]
    inside = new & (d < HEAD_DIM)[None, :]
    fresh = tl.load(
        new_ptr + (row - stored).to(tl.int64)[:, None] * stride_new + d[None, :], mask=inside, other=0.0
    )  # fmt: skip
    tl.store(cache_ptr + row.to(tl.int64)[:, None] * stride + d[None, :], fresh, mask=inside)
    return tl.where(new, fresh, tile)


@triton.jit
def _all_new_rows(rows, cache_ptr, new_ptr, start, stored, keys, stride, stride_new, BLOCK_N: tl.constexpr,
                  HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """_new_rows of each tile of `whole_rows`."""
    found = (_new_rows(rows[0], cache_ptr, new_ptr, start, stored, keys, stride, stride_new, BLOCK_N, HEAD_DIM,
                       COLUMNS),)  # fmt: skip
    for s in tl.static_range(1, len(rows)):
        found = found + (_new_rows(rows[s], cache_ptr, new_ptr, start, stored, keys, stride, stride_new, BLOCK_N,
                                   HEAD_DIM, COLUMNS, s * COLUMNS),)  # fmt: skip
    return found


@triton.jit
def _query_rows(q_rows, inside, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr):
    """The queries as a tuple of tiles, like `whole_rows`."""
    d = tl.arange(0, COLUMNS)[None, :]
    rows = (tl.load(q_rows + d, mask=inside & (d < HEAD_DIM), other=0.0),)
    for s in tl.static_range(1, (HEAD_DIM + COLUMNS - 1) // COLUMNS):
        mask = inside & (d < HEAD_DIM - s * COLUMNS)
        rows = rows + (tl.load(q_rows + s * COLUMNS + d, mask=mask, other=0.0),)
    return rows


@triton.jit
def _attend_few(
    acc, total, peak, tile, limits, bias_rows, mask_rows, relative_rows, new_k_ptr, new_v_ptr, begin, end, stored, keys,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, APPEND: tl.constexpr,
):  # fmt: skip
    """Add keys begin .. end of `keys` to the state of the rows; with APPEND keys from `stored` on are new."""
    q, k_ptr, v_ptr, position, stride_ks, stride_vs, stride_nks, stride_nvs, stride_bias_n, stride_mask_n = tile
    score_scale, softcap, window_left, window_right, reach = limits
    COLUMNS: tl.constexpr = 64 if PRECISION == "ieee" and BLOCK_D > 64 else BLOCK_D  # see product
    for start in tl.range(begin, end, BLOCK_N, num_stages=1 if APPEND else None):
        start = tl.multiple_of(start, BLOCK_N)
        column = (start + tl.arange(0, BLOCK_N))[None, :]
        k = whole_rows(k_ptr, start, stride_ks, stored, BLOCK_N, HEAD_DIM, COLUMNS, True, WIDE)
        v = load_tile(v_ptr, start, stride_vs, stored, BLOCK_N, HEAD_DIM, BLOCK_D, True, WIDE)
        if APPEND:
            k = _all_new_rows(
                k, k_ptr, new_k_ptr, start, stored, keys, stride_ks, stride_nks, BLOCK_N, HEAD_DIM, COLUMNS
            )
            v = _new_rows(v, v_ptr, new_v_ptr, start, stored, keys, stride_vs, stride_nvs, BLOCK_N, HEAD_DIM, BLOCK_D)
        scores = product(q, k, PRECISION)
        scores, _ = finish_scores(
            scores, position, column, keys, score_scale, softcap, bias_rows, stride_bias_n, mask_rows, stride_mask_n,
            relative_rows, reach, None, SOFTCAP, PRECISION == "ieee", True,
        )  # fmt: skip
        alive = visible(position, column, keys, window_left, window_right, LEFT, RIGHT)
        scores = tl.where(alive, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        p = exponential(scores, shift[:, None], False, PRECISION == "ieee")
        decay = exponential(peak, shift, False, PRECISION == "ieee")
        total = total * decay + tl.sum(p, 1)
        acc = add_product(acc * decay[:, None], p.to(v.dtype), v, PRECISION)
        peak = new_peak
    return acc, total, peak


@triton.jit(
    do_not_specialize=[
        "stride_lse_b", "stride_lse_h", "heads", "queries", "keys", "window_left", "window_right", "reach",
    ]
)  # fmt: skip
def _attention_decode_kernel(
    q_ptr, k_ptr, v_ptr, new_k_ptr, new_v_ptr, out_ptr, lse_ptr, cu_q_ptr, cu_k_ptr, key_lengths_ptr, bias_ptr,
    mask_ptr, relative_ptr,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_nkb, stride_nkh, stride_nks, stride_nvb, stride_nvh, stride_nvs,
    stride_ob, stride_oh, stride_os, stride_out_split, stride_lse_b, stride_lse_h, stride_lse_split,
    stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n,
    heads, queries, keys, score_scale, softcap, window_left, window_right, reach,
    GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Program (sequence and key head, split). Row r of the tile is query r % queries of head r // queries of the group.
    heads counts key heads. With SPLIT, out and lse are float32 parts. With new keys, k and v are the cache, key_lengths
    its lengths before, and query i has the position of new key i; new keys past the cache's end are dropped."""
    b = tl.program_id(0) // heads
    hk = tl.program_id(0) % heads
    split = tl.program_id(1)
    most = queries
    capacity = keys
    first_q, first_k, queries, keys, offset = sequence(
        b, cu_q_ptr, cu_k_ptr, key_lengths_ptr, queries, keys, BOTTOM_RIGHT
    )
    if queries <= 0:
        return
    stored = keys
    if new_k_ptr is not None:
        offset = stored
        keys = tl.minimum(stored + queries, capacity)
    r = tl.arange(0, BLOCK_M)
    i = r % most
    h = hk * GROUPS + r // most
    inside = (r < most * GROUPS) & (i < queries)
    h = tl.minimum(h, hk * GROUPS + GROUPS - 1)
    i = tl.minimum(i, queries - 1)
    d = tl.arange(0, BLOCK_D)
    here = inside[:, None] & (d < HEAD_DIM)[None, :]
    q_rows = row_pointer(q_ptr, b, 0, first_q, stride_qb, 0, stride_qs)
    q_rows += (h.to(tl.int64) * stride_qh + i.to(tl.int64) * stride_qs)[:, None]
    COLUMNS: tl.constexpr = 64 if PRECISION == "ieee" and BLOCK_D > 64 else BLOCK_D  # see product
    q = _query_rows(q_rows, inside[:, None], HEAD_DIM, COLUMNS)
    k_ptr = row_pointer(k_ptr, b, hk, first_k, stride_kb, stride_kh, stride_ks)
    v_ptr = row_pointer(v_ptr, b, hk, first_k, stride_vb, stride_vh, stride_vs)
    if new_k_ptr is not None:
        new_k_ptr = row_pointer(new_k_ptr, b, hk, 0, stride_nkb, stride_nkh, 0)
        new_v_ptr = row_pointer(new_v_ptr, b, hk, 0, stride_nvb, stride_nvh, 0)
    bias_rows = row_pointers(bias_ptr, b, h[:, None], i[:, None], stride_bias_b, stride_bias_h, stride_bias_m)
    mask_rows = row_pointers(mask_ptr, b, h[:, None], i[:, None], stride_mask_b, stride_mask_h, stride_mask_m)
    if relative_ptr is not None:
        relative_rows = relative_ptr + (h * (2 * reach + 1))[:, None]
    else:
        relative_rows = None

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    position = (i + offset)[:, None]
    begin, _inner_begin, _inner_end, end = key_bounds(
        offset, queries - 1 + offset, keys, window_left, window_right, LEFT, RIGHT, BLOCK_N
    )
    if SPLIT:
        share = tl.cdiv(tl.cdiv(end - begin, BLOCK_N), tl.num_programs(1)) * BLOCK_N
        begin += split * share
        end = tl.minimum(end, begin + share)
    tail = end  # keys from here on may be new
    if new_k_ptr is not None:
        tail = tl.minimum(tl.maximum(stored // TAIL * TAIL, begin), tl.maximum(end, begin))
    tile = (q, k_ptr, v_ptr, position, stride_ks, stride_vs, stride_nks, stride_nvs, stride_bias_n, stride_mask_n)
    limits = (score_scale, softcap, window_left, window_right, reach)
    acc, total, peak = _attend_few(
        acc, total, peak, tile, limits, bias_rows, mask_rows, relative_rows, new_k_ptr, new_v_ptr, begin, tail,
        tl.minimum(keys, tail), tl.minimum(keys, tail), HEAD_DIM, BLOCK_D, BLOCK_N, LEFT, RIGHT, SOFTCAP, PRECISION,
        WIDE, False,
    )  # fmt: skip
    if new_k_ptr is not None:
        acc, total, peak = _attend_few(
            acc, total, peak, tile, limits, bias_rows, mask_rows, relative_rows, new_k_ptr, new_v_ptr, tail, end,
            stored, keys, HEAD_DIM, BLOCK_D, TAIL, LEFT, RIGHT, SOFTCAP, PRECISION, WIDE, True,
        )  # fmt: skip

    dead = total == 0.0
    acc = acc * tl.where(dead, 0.0, 1.0 / total)[:, None]
    lse = tl.where(dead, float("-inf"), peak + tl.log2(total) * LN2)
    out_rows = (
        row_pointer(out_ptr, b, 0, first_q, stride_ob, 0, stride_os) + tl.cast(split, tl.int64) * stride_out_split
    )
    out_rows += (h.to(tl.int64) * stride_oh + i.to(tl.int64) * stride_os)[:, None]
    tl.store(out_rows + d[None, :], acc.to(out_ptr.dtype.element_ty), mask=here)
    lse_rows = row_pointer(lse_ptr, b, 0, first_q, stride_lse_b, 0, 1) + tl.cast(split, tl.int64) * stride_lse_split
    tl.store(lse_rows + h.to(tl.int64) * stride_lse_h + i, lse, mask=inside)


@triton.jit(do_not_specialize=["heads", "rows", "splits", "stride_lse_split"])
def _attention_combine_kernel(
    part_ptr, part_lse_ptr, out_ptr, lse_ptr, stride_part_split, stride_lse_split, stride_ob, stride_oh, stride_os,
    heads, rows, splits,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Program (row, sequence and head): out = sum_s exp(part_lse_s) part_s / sum_s exp(part_lse_s) over splits s.
    part: (splits, B, H, rows, HEAD_DIM), part_lse: (splits, B, H, rows)."""
    i = tl.program_id(0) % rows
    bh = tl.program_id(0) // rows
    split = tl.arange(0, SPLITS)
    d = tl.arange(0, BLOCK_D)
    place = tl.cast(bh, tl.int64) * rows + i
    part_lse = tl.load(
        part_lse_ptr + split.to(tl.int64) * stride_lse_split + place, mask=split < splits, other=float("-inf")
    )
    peak = tl.max(part_lse, 0)
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    weight = tl.exp2((part_lse - shift) * LOG2E)
    total = tl.sum(weight, 0)
    inside = (split < splits)[:, None] & (d < HEAD_DIM)[None, :]
    pointers = part_ptr + (split.to(tl.int64) * stride_part_split)[:, None] + place * HEAD_DIM + d[None, :]
    part = tl.load(pointers, mask=inside, other=0.0)
    dead = total == 0.0
    out = tl.sum(part * weight[:, None], 0) * tl.where(dead, 0.0, 1.0 / total)
    out_ptr = row_pointer(out_ptr, bh // heads, bh % heads, i, stride_ob, stride_oh, stride_os)
    tl.store(out_ptr + d, out.to(out_ptr.dtype.element_ty), mask=d < HEAD_DIM)
    tl.store(lse_ptr + place, tl.where(dead, float("-inf"), peak + tl.log2(total) * LN2))
