"""Additive attention: s_ij = v . tanh(q_i + k_j + b), w = softmax_j(s), context_i = sum_j w_ij value_j.

The hidden layer, (B, Sq, Sk, D), exists one tile at a time and is computed again in the backward pass, once for the
gradient of the queries and once for that of the keys. Each sum belongs to one program, so there are no atomics. Sums
are float32 and in a fixed order. Configurations are chosen from register counts, not timings.

Source: Bahdanau, Cho and Bengio, 2015, appendix A.1.2.
"""

import torch
import triton
import triton.language as tl

from .attention_common import _tanh

BLOCK_M, BLOCK_N = 16, 64  # tile of the matrix products
KEYS = 16  # per tile of the hidden layer


@triton.jit(do_not_specialize=["queries", "keys"])
def _additive_weights_kernel(
    query_ptr, key_ptr, score_weight_ptr, bias_ptr, mask_ptr, lengths_ptr, weights_ptr,
    stride_qb, stride_qs, stride_kb, stride_ks, stride_mb, stride_mq, stride_mk, queries, keys, width,
    EXACT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (sequence, query). The first pass stores the scores in weights_ptr and keeps a running maximum and sum;
    the second reads them again and normalises them."""
    row = tl.program_id(0).to(tl.int64)
    b = row // queries
    i = row % queries
    n = keys
    if lengths_ptr is not None:
        n = tl.minimum(n, tl.load(lengths_ptr + b).to(tl.int32))
    query_ptr += b * stride_qb + i * stride_qs
    weights_ptr += row * keys
    largest = tl.full((), -float("inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for start in range(0, keys, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        alive = j < n
        if mask_ptr is not None:
            masks = mask_ptr + b * stride_mb + i * stride_mq + j.to(tl.int64) * stride_mk
            alive = alive & (tl.load(masks, mask=alive, other=0) != 0)
        key_rows = key_ptr + b * stride_kb + j.to(tl.int64) * stride_ks
        scores = tl.zeros((BLOCK_N,), tl.float32)
        for first in range(0, width, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)
            inside = d < width
            base = tl.load(query_ptr + d, mask=inside, other=0.0).to(tl.float32)
            if bias_ptr is not None:
                base += tl.load(bias_ptr + d, mask=inside, other=0.0)
            v = tl.load(score_weight_ptr + d, mask=inside, other=0.0)
            key = tl.load(key_rows[:, None] + d[None, :], mask=alive[:, None] & inside[None, :], other=0.0)
            scores += tl.sum(_tanh(base[None, :] + key.to(tl.float32), EXACT) * v[None, :], 1)
        scores = tl.where(alive, scores, -float("inf"))
        tl.store(weights_ptr + j, scores, mask=j < keys)
        new_largest = tl.maximum(largest, tl.max(scores, 0))
        shift = tl.where(new_largest == -float("inf"), 0.0, new_largest)
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(scores - shift), 0)
        largest = new_largest
    shift = tl.where(largest == -float("inf"), 0.0, largest)
    inverse = tl.where(total == 0.0, 0.0, 1.0 / total)
    tl.debug_barrier()  # threads read below what other threads stored
    for start in range(0, keys, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        scores = tl.load(weights_ptr + j, mask=j < keys, other=-float("inf"))
        tl.store(weights_ptr + j, tl.exp(scores - shift) * inverse, mask=j < keys)


@triton.jit(do_not_specialize=["rows", "terms"])
def _additive_mix_kernel(
    weights_ptr, x_ptr, out_ptr, lengths_ptr, stride_wb, stride_wr, stride_wt, stride_xb, stride_xt, rows, terms, width,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (sequence and block of rows, block of columns): out_r = sum_t weights_rt x_t. Terms past the sequence's
    length are not read."""
    blocks = tl.cdiv(rows, BLOCK_M)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    r = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = terms
    if lengths_ptr is not None:
        n = tl.minimum(n, tl.load(lengths_ptr + b).to(tl.int32))
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, n, BLOCK_N):
        t = start + tl.arange(0, BLOCK_N)
        pointers = weights_ptr + b * stride_wb + (r.to(tl.int64) * stride_wr)[:, None]
        pointers += (t.to(tl.int64) * stride_wt)[None, :]
        w = tl.load(pointers, mask=(r < rows)[:, None] & (t < n)[None, :], other=0.0)
        pointers = x_ptr + b * stride_xb + (t.to(tl.int64) * stride_xt)[:, None] + d[None, :]
        x = tl.load(pointers, mask=(t < n)[:, None] & (d < width)[None, :], other=0.0)
        acc = tl.dot(w.to(x.dtype), x, acc, input_precision=PRECISION)
    out_ptr += ((b * rows + r) * width)[:, None] + d[None, :]
    tl.store(out_ptr, acc.to(out_ptr.dtype.element_ty), mask=(r < rows)[:, None] & (d < width)[None, :])


@triton.jit(do_not_specialize=["queries", "keys"])
def _additive_score_gradient_kernel(
    grad_ptr, grad_weights_ptr, weights_ptr, value_ptr, lengths_ptr, ds_ptr, stride_vb, stride_vs, queries, keys, width,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (sequence and block of queries): ds_ij = w_ij (dw_ij - sum_k w_ik dw_ik), dw_ij = grad_i . value_j +
    grad_weights_ij."""
    blocks = tl.cdiv(queries, BLOCK_M)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    here = (i < queries)[:, None]
    n = keys
    if lengths_ptr is not None:
        n = tl.minimum(n, tl.load(lengths_ptr + b).to(tl.int32))
    along = tl.zeros((BLOCK_M,), tl.float32)
    rows = (b * queries + i)[:, None]
    for start in range(0, keys, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        dw = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for first in range(0, width, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)
            inside = (d < width)[None, :]
            grad = tl.load(grad_ptr + rows * width + d[None, :], mask=here & inside, other=0.0)
            pointers = value_ptr + b * stride_vb + (j.to(tl.int64) * stride_vs)[:, None] + d[None, :]
            value = tl.load(pointers, mask=(j < n)[:, None] & inside, other=0.0)
            dw = tl.dot(grad, tl.trans(value), dw, input_precision=PRECISION)
        at = rows * keys + j[None, :]
        seen = here & (j < keys)[None, :]
        if grad_weights_ptr is not None:
            dw += tl.load(grad_weights_ptr + at, mask=seen, other=0.0)
        w = tl.load(weights_ptr + at, mask=seen, other=0.0)
        dw = tl.where(w == 0.0, 0.0, dw)
        along += tl.sum(w * dw, 1)
        tl.store(ds_ptr + at, dw, mask=seen)
    tl.debug_barrier()  # threads read below what other threads stored
    for start in range(0, keys, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        at = rows * keys + j[None, :]
        seen = here & (j < keys)[None, :]
        w = tl.load(weights_ptr + at, mask=seen, other=0.0)
        dw = tl.load(ds_ptr + at, mask=seen, other=0.0)
        tl.store(ds_ptr + at, w * (dw - along[:, None]), mask=seen)


@triton.jit(do_not_specialize=["rows", "terms"])
def _additive_hidden_gradient_kernel(
    row_ptr, term_ptr, score_weight_ptr, bias_ptr, ds_ptr, grad_ptr, parts_ptr,
    stride_rb, stride_rs, stride_tb, stride_ts, stride_db, stride_dr, stride_dt, rows, terms, width,
    EXACT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (sequence and row, block of columns): grad_r = v * sum_t ds_rt (1 - h_rt^2), and with parts_ptr parts_r =
    sum_t ds_rt h_rt, for h_rt = tanh(row_r + term_t + b). Rows are queries and terms are keys, or the reverse."""
    row = tl.program_id(0).to(tl.int64)
    b = row // rows
    r = row % rows
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < width
    base = tl.load(row_ptr + b * stride_rb + r * stride_rs + d, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        base += tl.load(bias_ptr + d, mask=inside, other=0.0)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    parts = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, terms, BLOCK_N):
        t = start + tl.arange(0, BLOCK_N)
        ds = tl.load(ds_ptr + b * stride_db + r * stride_dr + t.to(tl.int64) * stride_dt, mask=t < terms, other=0.0)
        pointers = term_ptr + b * stride_tb + (t.to(tl.int64) * stride_ts)[:, None] + d[None, :]
        term = tl.load(pointers, mask=(ds != 0.0)[:, None] & inside[None, :], other=0.0)
        h = _tanh(base[None, :] + term.to(tl.float32), EXACT)
        acc += tl.sum(ds[:, None] * (1.0 - h * h), 0)
        if parts_ptr is not None:
            parts += tl.sum(ds[:, None] * h, 0)
    acc *= tl.load(score_weight_ptr + d, mask=inside, other=0.0)
    tl.store(grad_ptr + row * width + d, acc.to(grad_ptr.dtype.element_ty), mask=inside)
    if parts_ptr is not None:
        tl.store(parts_ptr + row * width + d, parts, mask=inside)


def _columns(width: int, least: int = 16) -> int:
    return min(128, max(least, triton.next_power_of_2(width)))


def _precision(t: torch.Tensor) -> str:
    return "ieee" if t.dtype == torch.float32 else "tf32"


def _mix(weights, x, out, lengths, strides) -> None:
    """out (B, rows, W) = weights x, with weights[b, r, t] at strides (B, rows, terms)."""
    batch, rows, width = out.shape
    block = min(64, _columns(width))
    _additive_mix_kernel[(batch * triton.cdiv(rows, BLOCK_M), triton.cdiv(width, block))](
        weights, x, out, lengths, *strides, x.stride(0), x.stride(1), rows, x.shape[1], width,
        PRECISION=_precision(x), BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_D=block, num_warps=4,
    )  # fmt: skip


def additive_attention_forward(query, key, value, score_weight, bias, mask, key_lengths, out, weights) -> None:
    """Write out (B, Sq, Dv) and weights (B, Sq, Sk) float32.

    query (B, Sq, D), key (B, Sk, D), value (B, Sk, Dv): unit last stride; score_weight, bias: (D,) float32; mask: uint8
    (B, Sq, Sk), any strides, or None; key_lengths: (B,) int64 or None.
    """
    batch, queries, width = query.shape
    keys = key.shape[1]
    block = _columns(width)
    _additive_weights_kernel[(batch * queries,)](
        query, key, score_weight, bias, mask, key_lengths, weights, query.stride(0), query.stride(1), key.stride(0),
        key.stride(1), *((0, 0, 0) if mask is None else mask.stride()), queries, keys, width,
        EXACT=query.dtype == torch.float32, BLOCK_N=KEYS, BLOCK_D=block, num_warps=4,
        maxnreg=144 if query.dtype == torch.float32 else 128,
    )  # fmt: skip
    if value.shape[2]:
        _mix(weights, value, out, key_lengths, (queries * keys, keys, 1))


def additive_attention_backward(
    query, key, value, score_weight, bias, key_lengths, grad_out, grad_weights, weights,
    grad_query, grad_key, grad_value, grad_score_weight,
) -> None:  # fmt: skip
    """Write grad_query (B, Sq, D) float32, grad_key, grad_value and grad_score_weight (B, D) float32, one part per
    sequence. grad_out, grad_weights (or None), weights: contiguous; the last two float32."""
    batch, queries, width = query.shape
    keys, value_width = value.shape[1:]
    ds = torch.empty_like(weights)
    block = min(64, _columns(value_width))
    columns = BLOCK_N // 2 if value.element_size() == 4 else BLOCK_N  # exact products need more registers
    _additive_score_gradient_kernel[(batch * triton.cdiv(queries, BLOCK_M),)](
        grad_out, grad_weights, weights, value, key_lengths, ds, value.stride(0), value.stride(1), queries, keys,
        value_width, PRECISION=_precision(value), BLOCK_M=BLOCK_M, BLOCK_N=columns, BLOCK_D=block, num_warps=4,
        maxnreg=208 if value.element_size() == 2 else None,  # ptxas by itself takes fewer and may spill
    )  # fmt: skip
    _mix(weights, grad_out, grad_value, None, (queries * keys, 1, keys))
    parts = torch.empty((batch, queries, width), dtype=torch.float32, device=query.device)
    block = _columns(width)
    for rows, terms, strides, grad, sums in (
        (query, key, (keys, 1), grad_query, parts),
        (key, query, (1, keys), grad_key, None),
    ):
        _additive_hidden_gradient_kernel[(batch * rows.shape[1], triton.cdiv(width, block))](
            rows, terms, score_weight, bias, ds, grad, sums, rows.stride(0), rows.stride(1), terms.stride(0),
            terms.stride(1), queries * keys, *strides, rows.shape[1], terms.shape[1], width,
            EXACT=query.dtype == torch.float32, BLOCK_N=KEYS, BLOCK_D=block, num_warps=4,
        )  # fmt: skip
    torch.sum(parts, 1, out=grad_score_weight)
