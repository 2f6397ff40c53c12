"""y = keep * x / (1 - p) over rows, the mask from a counter (see philox). The backward is the same kernel."""

import triton
import triton.language as tl

from .philox import keep_mask

ROWS, BLOCK, NUM_WARPS = 8, 256, 4  # 16 elements per thread; not tuned


@triton.jit(do_not_specialize=["rows", "threshold"])
def _dropout_kernel(
    x_ptr, rng_ptr, y_ptr, x_stride, rows, width, threshold, keep_scale, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    blocks = tl.cdiv(width, BLOCK)  # all in grid axis 0: the other axes end at 65535
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first_column = tl.program_id(0) % blocks * BLOCK
    column = first_column + tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    keep = keep_mask(rng_ptr, 0, row, first_column, threshold, ROWS, BLOCK)
    y = x * tl.where(keep, keep_scale, 0.0)
    tl.store(y_ptr + row[:, None] * width + column[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


def dropout_forward(x, rng, threshold: int, keep_scale: float, y) -> None:
    """Write y. x: (rows, width), unit stride along the width; rng: {seed, offset} int64; y: contiguous."""
    rows, width = x.shape
    _dropout_kernel[(triton.cdiv(rows, ROWS) * triton.cdiv(width, BLOCK),)](
        x, rng, y, x.stride(0), rows, width, threshold, keep_scale, ROWS=ROWS, BLOCK=BLOCK, num_warps=NUM_WARPS
    )
