"""Rotary position embedding: the pairs of a head's columns rotated by the angle of the token's position.

A program rotates a block of rows, a row being one head of one token. Gradients are the same kernel, rotating back.

Tile sizes are chosen from the compiled code, not from timings: not yet run on a GPU.
"""

import triton
import triton.language as tl

TILE = 2048  # elements of a program of NUM_WARPS warps: 16 per thread
NUM_WARPS = 4


@triton.jit(do_not_specialize=["rows", "length"])
def _rotary_kernel(
    x_ptr, cos_ptr, sin_ptr, positions_ptr, y_ptr, rows, length, heads, width, half,
    x_batch, x_token, x_head, position_batch, position_token,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
    REST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = row < rows
    token = row // heads
    batch = token // length
    place = token - batch * length
    position = place
    if positions_ptr is not None:
        position = tl.load(positions_ptr + batch * position_batch + place * position_token, mask=real, other=0)
    x_row = x_ptr + batch * x_batch + place * x_token + (row - token * heads) * x_head
    y_row = y_ptr + row * width
    pair = tl.arange(0, HALF)
    mask = real[:, None] if EVEN else real[:, None] & (pair < half)[None, :]
    angle = position[:, None] * half + pair[None, :]
    cos = tl.load(cos_ptr + angle, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=mask, other=0.0)
    if INVERSE:
        sin = -sin
    if INTERLEAVED:
        column = tl.arange(0, 2 * HALF)
        both = real[:, None] if EVEN else real[:, None] & (column < 2 * half)[None, :]
        x = tl.load(x_row[:, None] + column[None, :], mask=both, other=0.0).to(tl.float32)
        x1, x2 = tl.split(tl.reshape(x, (ROWS, HALF, 2)))
        y = tl.reshape(tl.join(x1 * cos - x2 * sin, x2 * cos + x1 * sin), (ROWS, 2 * HALF))
        tl.store(y_row[:, None] + column[None, :], y.to(y_ptr.dtype.element_ty), mask=both)
    else:
        x1 = tl.load(x_row[:, None] + pair[None, :], mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(x_row[:, None] + half + pair[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(y_row[:, None] + pair[None, :], (x1 * cos - x2 * sin).to(y_ptr.dtype.element_ty), mask=mask)
        tl.store(y_row[:, None] + half + pair[None, :], (x2 * cos + x1 * sin).to(y_ptr.dtype.element_ty), mask=mask)
    if REST:
        column = 2 * half + tl.arange(0, REST)
        rest = real[:, None] & (column < width)[None, :]
        x = tl.load(x_row[:, None] + column[None, :], mask=rest, other=0.0)
        tl.store(y_row[:, None] + column[None, :], x, mask=rest)


def rotary(x, cos, sin, positions, interleaved: bool, inverse: bool, y) -> None:
    """Write y. x: (batch, length, heads, width), last stride 1; y: the same, contiguous. cos, sin: float32
    (positions, half), contiguous. positions: int64 (batch, length) or None."""
    batch, length, heads, width = x.shape
    half = cos.shape[1]
    block = max(4, triton.next_power_of_2(half))
    rows = max(1, TILE // (2 * block))
    rest = width - 2 * half
    strides = (0, 0) if positions is None else positions.stride()
    _rotary_kernel[(triton.cdiv(batch * length * heads, rows),)](
        x, cos, sin, positions, y, batch * length * heads, length, heads, width, half, *x.stride()[:3], *strides,
        INTERLEAVED=interleaved, INVERSE=inverse, EVEN=half == block, ROWS=rows, HALF=block,
        REST=triton.next_power_of_2(rest) if rest else 0, num_warps=NUM_WARPS,
    )  # fmt: skip
