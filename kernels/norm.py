"""layer_norm and rms_norm over rows, with the residual addition and dropout before them; forward and backward.

    v = residual + dropout(x)      y = weight * (v - mean) * rstd + bias

Up to FORWARD_WIDTH and BACKWARD_WIDTH columns a program holds a row in registers, or several narrow ones; wider rows
are read twice. Statistics are float32. The backward pass is a grid of a few programs per multiprocessor. Each walks
over its rows once, keeps its share of the weight and bias gradients in registers and writes it to a float32
workspace, which a second kernel adds up in a fixed order: no atomics.

Configurations come from `forward_config` and `backward_config`. They are chosen from
register and shared memory counts of the compiled code, not from timings.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .column_sum import column_sum
from .direct import DIRECT
from .philox import keep_mask

FORWARD_WIDTH = 16384
BACKWARD_WIDTH = 8192


@triton.jit
def _residual_sum(
    x_ptr, residual_ptr, rng_ptr, x_stride, residual_stride, row, first_column, mask, threshold, keep_scale,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """residual + dropout(x) for a tile, rounded to the dtype of x: what is normalised is what is returned."""
    column = first_column + tl.arange(0, BLOCK)[None, :]
    v = tl.load(x_ptr + row[:, None] * x_stride + column, mask=mask, other=0.0)
    if rng_ptr is not None:
        keep = keep_mask(rng_ptr, 0, row, first_column, threshold, ROWS, BLOCK)
        v = v.to(tl.float32) * tl.where(keep, keep_scale, 0.0)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row[:, None] * residual_stride + column, mask=mask, other=0.0)
        v = v.to(tl.float32) + residual.to(tl.float32)
    return v.to(x_ptr.dtype.element_ty)


@triton.jit
def _scale_and_shift(y, weight_ptr, bias_ptr, column, inside):
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit(do_not_specialize=["rows", "threshold"])
def _layer_norm_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, rng_ptr, y_ptr, sum_ptr, mean_ptr, rstd_ptr,
    x_stride, residual_stride, rows, width, eps, threshold, keep_scale,
    RMS: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows per program, BLOCK >= width columns; EVEN: BLOCK == width."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = column < width
    exists = row < rows
    mask = exists[:, None] if EVEN else exists[:, None] & inside[None, :]
    out = row[:, None] * width + column[None, :]
    v = _residual_sum(
        x_ptr, residual_ptr, rng_ptr, x_stride, residual_stride, row, 0, mask, threshold, keep_scale, ROWS, BLOCK
    )
    if sum_ptr is not None:
        tl.store(sum_ptr + out, v, mask=mask)
    centred = v.to(tl.float32)
    if not RMS:
        mean = tl.sum(centred, 1) / width
        centred -= mean[:, None]
        if not EVEN:
            centred = tl.where(inside[None, :], centred, 0.0)
        if mean_ptr is not None:
            tl.store(mean_ptr + row, mean, mask=exists)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 1) / width + eps)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + row, rstd, mask=exists)
    y = _scale_and_shift(centred * rstd[:, None], weight_ptr, bias_ptr, column, inside)
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "threshold"])
def _layer_norm_forward_wide_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, rng_ptr, y_ptr, sum_ptr, mean_ptr, rstd_ptr,
    x_stride, residual_stride, rows, width, eps, threshold, keep_scale,
    RMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row per program, in blocks of columns: statistics in the first pass, y in the second."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    mean = tl.zeros((1,), tl.float32)
    squares = tl.zeros((1,), tl.float32)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = (column < width)[None, :]
        v = _residual_sum(
            x_ptr, residual_ptr, rng_ptr, x_stride, residual_stride, row, first, inside, threshold, keep_scale, 1, BLOCK
        )
        if sum_ptr is not None:
            tl.store(sum_ptr + row[:, None] * width + column[None, :], v, mask=inside)
        v = v.to(tl.float32)
        if not RMS:
            # Mean and sum of squared deviations of the block, joined to those of the blocks before (Chan et al., 1979).
            count = tl.minimum(width - first, BLOCK)
            block_mean = tl.sum(v, 1) / count
            v = tl.where(inside, v - block_mean[:, None], 0.0)
            shift = block_mean - mean
            squares += shift * shift * (first * (count / (first + count)))
            mean += shift * (count / (first + count))
        squares += tl.sum(v * v, 1)
    rstd = 1.0 / tl.sqrt_rn(squares / width + eps)
    if mean_ptr is not None:
        tl.store(mean_ptr + row, mean)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + row, rstd)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < width
        v = _residual_sum(
            x_ptr, residual_ptr, rng_ptr, x_stride, residual_stride, row, first, inside[None, :], threshold, keep_scale,
            1, BLOCK,
        )  # fmt: skip
        y = (v.to(tl.float32) - mean[:, None]) * rstd[:, None]
        y = _scale_and_shift(y, weight_ptr, bias_ptr, column, inside)
        tl.store(y_ptr + row[:, None] * width + column[None, :], y.to(y_ptr.dtype.element_ty), mask=inside[None, :])


@triton.jit
def _load_backward_tile(grad_y_ptr, v_ptr, mean_ptr, rstd_ptr, grad_y_stride, v_stride, row, column, exists, mask):
    """grad_y, the normalised value and rstd of a tile, float32."""
    grad_y = tl.load(grad_y_ptr + row[:, None] * grad_y_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    normed = tl.load(v_ptr + row[:, None] * v_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + row, mask=exists, other=0.0)
    if mean_ptr is not None:
        normed -= tl.load(mean_ptr + row, mask=exists, other=0.0)[:, None]
    return grad_y, normed * rstd[:, None], rstd


@triton.jit(do_not_specialize=["rows", "threshold"])
def _layer_norm_backward_kernel(
    grad_y_ptr, grad_sum_ptr, v_ptr, weight_ptr, mean_ptr, rstd_ptr, rng_ptr, row_means_ptr,
    grad_v_ptr, grad_x_ptr, partial_ptr, grad_y_stride, grad_sum_stride, v_stride, rows, width, threshold, keep_scale,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Program (p, c) walks over rows p * ROWS, (p + programs) * ROWS, ... of column block c.

    grad_v = rstd * (g - mean(g) - normed * mean(g * normed)) + grad_sum with g = weight * grad_y; the two means are
    computed here when the block holds the whole row, else read from row_means. No mean_ptr: rms_norm.
    partial: (WEIGHT + BIAS, programs, width), sums per program of grad_y * normed and of grad_y.
    """
    first_column = tl.program_id(1) * BLOCK
    column = first_column + tl.arange(0, BLOCK)
    inside = column < width
    # Two rows lie in the registers of the same threads, and are added at once: it halves the registers of the sums.
    PARTS: tl.constexpr = 1 if ROWS == 2 else ROWS
    grad_weight = tl.zeros((PARTS, BLOCK), tl.float32)
    grad_bias = tl.zeros((PARTS, BLOCK), tl.float32)
    if weight_ptr is not None and rng_ptr is None:
        weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    step = tl.num_programs(0) * ROWS
    for first_row in tl.range(tl.program_id(0) * ROWS, rows, step, num_stages=STAGES):
        row = (first_row + tl.arange(0, ROWS)).to(tl.int64)
        exists = row < rows
        mask = exists[:, None] if EVEN else exists[:, None] & inside[None, :]
        grad_y, normed, rstd = _load_backward_tile(
            grad_y_ptr, v_ptr, mean_ptr, rstd_ptr, grad_y_stride, v_stride, row, column, exists, mask
        )
        grad_normed = grad_y
        if weight_ptr is not None:
            if rng_ptr is not None:  # the dropout mask leaves no registers for the weight
                weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
            grad_normed *= weight.to(tl.float32)[None, :]
        if WEIGHT:
            grad_weight += grad_y * normed if PARTS == ROWS else tl.sum(grad_y * normed, 0)[None, :]
        if BIAS:
            grad_bias += grad_y if PARTS == ROWS else tl.sum(grad_y, 0)[None, :]
        if row_means_ptr is not None:
            mean_along = tl.load(row_means_ptr + row, mask=exists, other=0.0)
            if mean_ptr is not None:
                mean_grad = tl.load(row_means_ptr + rows + row, mask=exists, other=0.0)
        elif mean_ptr is not None:  # both sums in one reduction, whose barriers are what it costs
            mean_along, mean_grad = tl.split(tl.sum(tl.join(grad_normed * normed, grad_normed), 1) / width)
        else:
            mean_along = tl.sum(grad_normed * normed, 1) / width
        grad_v = grad_normed - normed * mean_along[:, None]
        if mean_ptr is not None:
            grad_v -= mean_grad[:, None]
        grad_v *= rstd[:, None]
        if grad_sum_ptr is not None:
            along_sum = grad_sum_ptr + row[:, None] * grad_sum_stride + column[None, :]
            grad_v += tl.load(along_sum, mask=mask, other=0.0).to(tl.float32)
        out = row[:, None] * width + column[None, :]
        tl.store(grad_v_ptr + out, grad_v.to(grad_v_ptr.dtype.element_ty), mask=mask)
        if rng_ptr is not None:
            keep = keep_mask(rng_ptr, 0, row, first_column, threshold, ROWS, BLOCK)
            grad_x = grad_v * tl.where(keep, keep_scale, 0.0)
            tl.store(grad_x_ptr + out, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
    partial = tl.program_id(0).to(tl.int64) * width + column
    if WEIGHT:
        tl.store(partial_ptr + partial, tl.sum(grad_weight, 0), mask=inside)
        partial += tl.num_programs(0).to(tl.int64) * width
    if BIAS:
        tl.store(partial_ptr + partial, tl.sum(grad_bias, 0), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _layer_norm_backward_means_kernel(
    grad_y_ptr, v_ptr, weight_ptr, mean_ptr, rstd_ptr, row_means_ptr, grad_y_stride, v_stride, rows, width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """row_means: (2, rows), mean(g * normed) and mean(g) of rows too wide for one block."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    along = tl.zeros((1, BLOCK), tl.float32)
    total = tl.zeros((1, BLOCK), tl.float32)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < width
        grad_normed, normed, _ = _load_backward_tile(
            grad_y_ptr, v_ptr, mean_ptr, rstd_ptr, grad_y_stride, v_stride, row, column, row < rows, inside[None, :]
        )
        if weight_ptr is not None:
            grad_normed *= tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        along += grad_normed * normed
        total += grad_normed
    tl.store(row_means_ptr + row, tl.sum(along, 1) / width)
    tl.store(row_means_ptr + rows + row, tl.sum(total, 1) / width)


class Config(NamedTuple):
    """Rows and columns of a program's tile, its warps, and (backward) programs per multiprocessor and load stages."""

    rows: int
    block: int
    num_warps: int
    programs: int = 1
    stages: int = 1


REGISTERS = 128  # per thread of the backward: ptxas by itself takes fewer, to fit more programs, and spills
PREFETCHED = 96 << 10  # sm_120 has 99 KiB of shared memory
WIDE_FORWARD = Config(rows=1, block=4096, num_warps=8)
WIDE_BACKWARD = Config(rows=2, block=1024, num_warps=4, programs=4)


def _tile(width: int, dropout: bool, elements: int) -> tuple[int, int]:
    """Rows and columns of a tile of about `elements`: narrow rows share a program. Dropout needs multiples of 128."""
    block = max(triton.next_power_of_2(width), 128 if dropout else 16)
    return max(1, elements // block), block


def forward_config(width: int, dropout: bool) -> Config:
    """16 elements per thread; 32 in the widest rows, where more programs then fit on a multiprocessor, so that some
    load while others compute. (With dropout 8 warps would spill at 8192 columns.)"""
    if width > FORWARD_WIDTH:
        return WIDE_FORWARD
    rows, block = _tile(width, dropout, 2048)
    most = 8 if block <= 8192 and not dropout else 16
    return Config(rows, block, num_warps=min(most, rows * block // 512))


def backward_config(width: int, itemsize: int, dropout: bool, tensors: int = 2) -> Config:
    """32 bytes of each tensor per thread and 16 warps per multiprocessor, so 128 registers per thread.

    tensors: how many are read. Memory keeps busy only while the loads of the next rows are under way when a row is
    computed. They go to shared memory: of up to three tiles, in at most PREFETCHED bytes per multiprocessor.
    """
    if width > BACKWARD_WIDTH:
        return WIDE_BACKWARD
    rows, block = _tile(width, dropout, 4096 // itemsize)
    num_warps = min(16, rows * block * itemsize // 1024)
    programs = 16 // num_warps
    tiles = min(3, PREFETCHED // (programs * tensors * rows * block * itemsize))
    return Config(rows, block, num_warps, programs, stages=tiles + 1 if tiles > 1 else 1)


def layer_norm_forward(
    x, residual, weight, bias, rng, eps, rms, threshold, keep_scale, y, sum_out, mean, rstd, plan=DIRECT
) -> None:  # fmt: skip
    """Write y and, where given, sum_out, mean and rstd.

    x, residual: (rows, width), unit stride along the width. weight, bias: (width,). rng: {seed, offset} int64,
    with dropout. y, sum_out: (rows, width) contiguous, of x's dtype. mean, rstd: (rows,) float32.
    """
    rows, width = x.shape
    config = forward_config(width, rng is not None)
    args = (x, residual, weight, bias, rng, y, sum_out, mean, rstd, x.stride(0), 0 if residual is None else
            residual.stride(0), rows, width, eps, threshold, keep_scale)  # fmt: skip
    if width > FORWARD_WIDTH:
        plan.call(
            _layer_norm_forward_wide_kernel, (rows,), *args, RMS=rms, BLOCK=config.block, num_warps=config.num_warps
        )
    else:
        plan.call(
            _layer_norm_forward_kernel, (triton.cdiv(rows, config.rows),), *args, RMS=rms, EVEN=width == config.block,
            ROWS=config.rows, BLOCK=config.block, num_warps=config.num_warps,
        )  # fmt: skip


def layer_norm_backward(
    grad_y, grad_sum, v, weight, rng, threshold, keep_scale, mean, rstd, grad_v, grad_x, grad_weight, grad_bias,
    multiprocessors: int, plan=DIRECT,
) -> None:  # fmt: skip
    """Write grad_v, with dropout grad_x, and grad_weight, grad_bias if given, each in its dtype.

    grad_y, grad_sum, v: (rows, width), unit stride along the width. mean: None for rms_norm. The order of every sum
    depends only on shapes and on `multiprocessors`: results are bitwise reproducible.
    """
    rows, width = v.shape
    config = backward_config(width, v.element_size(), rng is not None, 2 if grad_sum is None else 3)
    column_blocks = triton.cdiv(width, config.block)
    programs = max(1, multiprocessors * config.programs // column_blocks)
    programs = min(programs, triton.cdiv(rows, config.rows))
    wanted = [t for t in (grad_weight, grad_bias) if t is not None]
    partial = plan.empty((len(wanted), programs, width), rstd.dtype, rstd.device) if wanted else None
    row_means = None
    if column_blocks > 1:
        row_means = plan.empty((2, rows), rstd.dtype, rstd.device)
        plan.call(
            _layer_norm_backward_means_kernel, (rows,), grad_y, v, weight, mean, rstd, row_means, grad_y.stride(0),
            v.stride(0), rows, width, BLOCK=WIDE_FORWARD.block, num_warps=WIDE_FORWARD.num_warps,
        )  # fmt: skip
    plan.call(
        _layer_norm_backward_kernel, (programs, column_blocks), grad_y, grad_sum, v, weight, mean, rstd, rng, row_means,
        grad_v, grad_x, partial, grad_y.stride(0), 0 if grad_sum is None else grad_sum.stride(0), v.stride(0), rows,
        width, threshold, keep_scale,
        WEIGHT=grad_weight is not None, BIAS=grad_bias is not None, EVEN=width % config.block == 0,
        ROWS=config.rows, BLOCK=config.block, STAGES=config.stages, num_warps=config.num_warps, maxnreg=REGISTERS,
    )  # fmt: skip
    if wanted:
        column_sum(partial, *wanted, plan=plan)
