"""Sum of per-program partials: the second half of a deterministic reduction over rows."""

import triton
import triton.language as tl

from .direct import DIRECT


@triton.jit(do_not_specialize=["partials"])
def _column_sum_kernel(partial_ptr, first_ptr, second_ptr, partials, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    which = tl.program_id(1)
    inside = column < width
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first_row in range(0, partials, ROWS):
        row = first_row + tl.arange(0, ROWS)
        offset = (which * partials + row).to(tl.int64)[:, None] * width + column[None, :]
        total += tl.load(partial_ptr + offset, mask=(row < partials)[:, None] & inside[None, :], other=0.0)
    result = tl.sum(total, 0)
    if which == 0:
        tl.store(first_ptr + column, result, mask=inside)
    elif second_ptr is not None:
        tl.store(second_ptr + column, result, mask=inside)


def column_sum(partial, first, second=None, plan=DIRECT) -> None:
    """first[c] = sum over p of partial[0, p, c], and second[c] of partial[1, p, c]; one launch, fixed order.

    partial: (1 or 2, partials, width) float32, contiguous; first, second: (width,), each rounded to its dtype.
    """
    outputs, partials, width = partial.shape
    block = 16  # few columns per program: width / 16 programs fill a GPU at the widths of transformers
    plan.call(
        _column_sum_kernel, (triton.cdiv(width, block), outputs), partial, first, second, partials, width, ROWS=256,
        BLOCK=block, num_warps=4,
    )  # fmt: skip
