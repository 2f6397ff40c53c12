"""Token + segment + position embeddings, layer norm and dropout in one pass; gradients without atomics.

    v = word[ids] + token_type[type_ids] + position[position_ids]      y = dropout(weight * (v - mean) * rstd + bias)

Nothing of the size of y is kept: the backward pass gathers v again. It writes the gradient of v in float32. Sorting
the ids then finds the rows of each table entry, and the programs of the entry add them up in a fixed order.
Configurations are chosen from register counts, not timings.
"""

import torch
import triton
import triton.language as tl

from .column_sum import column_sum
from .norm import backward_config, forward_config
from .philox import keep_mask


@triton.jit
def _lookup(ids_ptr, table_ptr, entries, stride, row, column, exists, mask):
    """table[ids[row]], float32; NaN where an id is outside the table."""
    index = tl.load(ids_ptr + row, mask=exists, other=0)
    valid = (index >= 0) & (index < entries)
    v = tl.load(table_ptr + index[:, None] * stride + column[None, :], mask=mask & valid[:, None], other=0.0)
    return tl.where(valid[:, None], v.to(tl.float32), float("nan"))


@triton.jit
def _gather(
    ids_ptr, word_ptr, type_ids_ptr, type_ptr, position_ids_ptr, position_ptr, entries, types, positions,
    word_stride, type_stride, position_stride, row, column, exists, mask,
):  # fmt: skip
    v = _lookup(ids_ptr, word_ptr, entries, word_stride, row, column, exists, mask)
    if type_ptr is not None:
        v += _lookup(type_ids_ptr, type_ptr, types, type_stride, row, column, exists, mask)
    if position_ptr is not None:
        v += _lookup(position_ids_ptr, position_ptr, positions, position_stride, row, column, exists, mask)
    return v


@triton.jit(do_not_specialize=["rows", "threshold", "entries", "types", "positions"])
def _embedding_forward_kernel(
    ids_ptr, word_ptr, type_ids_ptr, type_ptr, position_ids_ptr, position_ptr, entries, types, positions,
    word_stride, type_stride, position_stride, weight_ptr, bias_ptr, rng_ptr, y_ptr, mean_ptr, rstd_ptr,
    rows, width, eps, threshold, keep_scale, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = column < width
    exists = row < rows
    mask = exists[:, None] & inside[None, :]
    v = _gather(
        ids_ptr, word_ptr, type_ids_ptr, type_ptr, position_ids_ptr, position_ptr, entries, types, positions,
        word_stride, type_stride, position_stride, row, column, exists, mask,
    )  # fmt: skip
    mean = tl.sum(tl.where(inside[None, :], v, 0.0), 1) / width
    centred = tl.where(inside[None, :], v - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 1) / width + eps)
    tl.store(mean_ptr + row, mean, mask=exists)
    tl.store(rstd_ptr + row, rstd, mask=exists)
    y = centred * rstd[:, None]
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    if rng_ptr is not None:
        y *= tl.where(keep_mask(rng_ptr, 0, row, 0, threshold, ROWS, BLOCK), keep_scale, 0.0)
    tl.store(y_ptr + row[:, None] * width + column[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "threshold", "entries", "types", "positions"])
def _embedding_backward_kernel(
    grad_y_ptr, ids_ptr, word_ptr, type_ids_ptr, type_ptr, position_ids_ptr, position_ptr, entries, types, positions,
    word_stride, type_stride, position_stride, weight_ptr, mean_ptr, rstd_ptr, rng_ptr, grad_v_ptr, partial_ptr,
    rows, width, threshold, keep_scale, WEIGHT: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Program p walks over rows p * ROWS, (p + programs) * ROWS, ...

    grad_v = rstd * (g - mean(g) - normed * mean(g * normed)), g = weight * dropout(grad_y).
    partial: (WEIGHT + BIAS, programs, width), sums per program of dropout(grad_y) * normed and of dropout(grad_y).
    """
    column = tl.arange(0, BLOCK)
    inside = column < width
    grad_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    grad_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    step = tl.num_programs(0) * ROWS
    for first_row in tl.range(tl.program_id(0) * ROWS, rows, step, num_stages=1):
        row = (first_row + tl.arange(0, ROWS)).to(tl.int64)
        exists = row < rows
        mask = exists[:, None] & inside[None, :]
        grad_y = tl.load(grad_y_ptr + row[:, None] * width + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if rng_ptr is not None:
            grad_y *= tl.where(keep_mask(rng_ptr, 0, row, 0, threshold, ROWS, BLOCK), keep_scale, 0.0)
        v = _gather(
            ids_ptr, word_ptr, type_ids_ptr, type_ptr, position_ids_ptr, position_ptr, entries, types, positions,
            word_stride, type_stride, position_stride, row, column, exists, mask,
        )  # fmt: skip
        rstd = tl.load(rstd_ptr + row, mask=exists, other=0.0)
        normed = (v - tl.load(mean_ptr + row, mask=exists, other=0.0)[:, None]) * rstd[:, None]
        normed = tl.where(mask, normed, 0.0)
        grad = grad_y
        if weight_ptr is not None:
            grad *= tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        along = tl.sum(grad * normed, 1) / width
        across = tl.sum(grad, 1) / width
        grad_v = (grad - across[:, None] - normed * along[:, None]) * rstd[:, None]
        tl.store(grad_v_ptr + row[:, None] * width + column[None, :], grad_v, mask=mask)
        if WEIGHT:
            grad_weight += grad_y * normed
        if BIAS:
            grad_bias += grad_y
    partial = tl.program_id(0).to(tl.int64) * width + column
    if WEIGHT:
        tl.store(partial_ptr + partial, tl.sum(grad_weight, 0), mask=inside)
        partial += tl.num_programs(0).to(tl.int64) * width
    if BIAS:
        tl.store(partial_ptr + partial, tl.sum(grad_bias, 0), mask=inside)


@triton.jit(do_not_specialize=["entries", "padding_idx"])
def _embedding_gradient_kernel(
    grad_v_ptr, order_ptr, starts_ptr, out_ptr, width, entries, padding_idx, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Program (entry, c, s): the sum of part s of this entry's rows, order[starts[entry] : starts[entry + 1]], over
    column block c, into out (parts, entries, width)."""
    entry = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    start = tl.load(starts_ptr + entry)
    end = tl.where(entry == padding_idx, start, tl.load(starts_ptr + entry + 1))
    length = tl.cdiv(end - start, tl.num_programs(2))
    begin = start + tl.program_id(2) * length
    end = tl.minimum(begin + length, end)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(begin, end, ROWS):
        i = first + tl.arange(0, ROWS)
        row = tl.load(order_ptr + i, mask=i < end, other=0)
        mask = (i < end)[:, None] & inside[None, :]
        total += tl.load(grad_v_ptr + row[:, None] * width + column[None, :], mask=mask, other=0.0)
    out = (tl.program_id(2) * entries + entry).to(tl.int64) * width + column
    tl.store(out_ptr + out, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=inside)


def _tables(ids, word, type_ids, token_type, position_ids, position):
    tables = (word, token_type, position)
    return (
        ids, word, type_ids, token_type, position_ids, position, *(0 if t is None else t.shape[0] for t in tables),
        *(0 if t is None else t.stride(0) for t in tables),
    )  # fmt: skip


REGISTERS = 168  # per thread of the backward: 128 as for a norm, the rest for the addresses of the gathers


def embedding_layer_norm_forward(
    ids, word, type_ids, token_type, position_ids, position, weight, bias, rng, eps, threshold, keep_scale, y, mean,
    rstd,
) -> None:  # fmt: skip
    """Write y (rows, width), contiguous, and mean, rstd (rows,) float32.

    ids: (rows,) int64, contiguous; tables: (entries, width), unit stride along the width, or None.
    """
    rows, width = y.shape
    config = forward_config(width, rng is not None)
    _embedding_forward_kernel[(triton.cdiv(rows, config.rows),)](
        *_tables(ids, word, type_ids, token_type, position_ids, position), weight, bias, rng, y, mean, rstd, rows,
        width, eps, threshold, keep_scale, ROWS=config.rows, BLOCK=config.block, num_warps=config.num_warps,
    )  # fmt: skip


def embedding_layer_norm_backward(
    grad_y, ids, word, type_ids, token_type, position_ids, position, weight, mean, rstd, rng, threshold, keep_scale,
    grad_v, grad_weight, grad_bias, multiprocessors: int,
) -> None:  # fmt: skip
    """Write grad_v (rows, width) and, if given, grad_weight and grad_bias (width,), all float32."""
    rows, width = grad_v.shape
    config = backward_config(width, grad_y.element_size(), rng is not None)
    programs = min(max(1, multiprocessors * config.programs), triton.cdiv(rows, config.rows))
    wanted = [t for t in (grad_weight, grad_bias) if t is not None]
    partial = grad_v.new_empty((len(wanted), programs, width)) if wanted else None
    _embedding_backward_kernel[(programs,)](
        grad_y, *_tables(ids, word, type_ids, token_type, position_ids, position), weight, mean, rstd, rng, grad_v,
        partial, rows, width, threshold, keep_scale, WEIGHT=grad_weight is not None, BIAS=grad_bias is not None,
        ROWS=config.rows, BLOCK=config.block, num_warps=config.num_warps, maxnreg=REGISTERS,
    )  # fmt: skip
    if wanted:
        column_sum(partial, *wanted)


def embedding_gradient(grad_v, ids, padding_idx: int, grad_table) -> None:
    """Write grad_table (entries, width): entry e is the sum of grad_v[r] over the rows with ids[r] == e, and zero for
    padding_idx (negative: none)."""
    (rows, width), entries = grad_v.shape, grad_table.shape[0]
    in_order, order = torch.sort(ids, stable=True)
    starts = torch.searchsorted(in_order, torch.arange(entries + 1, device=ids.device))
    # Few entries and many rows (token types): several programs per entry, whose parts are added up afterwards.
    parts = max(1, min(64, rows // (64 * entries)))
    out = grad_table if parts == 1 else grad_v.new_empty((parts, entries, width))
    block = min(256, max(16, triton.next_power_of_2(width)))
    _embedding_gradient_kernel[(entries, triton.cdiv(width, block), parts)](
        grad_v, order, starts, out, width, entries, padding_idx, ROWS=4, BLOCK=block, num_warps=2
    )
    if parts > 1:
        grad_table.copy_(out.sum(0))
