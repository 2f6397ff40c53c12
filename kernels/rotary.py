"""Rotary position embedding: pairs of a head's columns are rotated by an angle that depends on the token's position.

A program rotates a block of rows; a row is one head of one token. The backward is the same kernel, rotating back.

In decoding, keys and values share the launch along the grid's second axis: queries go to a tensor of their own, keys
and values to the cache, after the tokens that it holds. An RMS norm of each head (Qwen 3) may come first: the row is in
registers anyway.

Tile sizes are chosen from the compiled code, not from timings.
"""

import triton
import triton.language as tl

TILE = 2048  # elements per program of NUM_WARPS warps: 16 per thread
NUM_WARPS = 4
FEW = 2**16  # up to this many elements (a decoding step) a program is one warp: more and shorter programs


@triton.jit
def _rotate_rows(
    x_row, y_row, weight_ptr, cos_ptr, sin_ptr, position, real, written, width, half, eps,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, EVEN: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Rotate rows at x_row where `real` into y_row where `written`. weight_ptr: of the RMS norm of a row, or None."""
    pair = tl.arange(0, HALF)
    mask = real[:, None] if EVEN else real[:, None] & (pair < half)[None, :]
    store = written[:, None] if EVEN else written[:, None] & (pair < half)[None, :]
    angle = position[:, None].to(tl.int64) * half + pair[None, :]
    cos = tl.load(cos_ptr + angle, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=mask, other=0.0)
    if INVERSE:
        sin = -sin
    if INTERLEAVED:
        column = tl.arange(0, 2 * HALF)
        both = real[:, None] if EVEN else real[:, None] & (column < 2 * half)[None, :]
        x = tl.load(x_row[:, None] + column[None, :], mask=both, other=0.0).to(tl.float32)
        x1, x2 = tl.split(tl.reshape(x, (x.shape[0], HALF, 2)))
    else:
        x1 = tl.load(x_row[:, None] + pair[None, :], mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(x_row[:, None] + half + pair[None, :], mask=mask, other=0.0).to(tl.float32)
    if REST:
        other = 2 * half + tl.arange(0, REST)
        rest = tl.load(x_row[:, None] + other[None, :], mask=real[:, None] & (other < width)[None, :], other=0.0)
    if weight_ptr is not None:
        square = tl.sum(x1 * x1 + x2 * x2, 1)
        if REST:
            wide = rest.to(tl.float32)
            square += tl.sum(wide * wide, 1)
        scale = (1.0 / tl.sqrt(square / width + eps))[:, None]
        first = 2 * pair if INTERLEAVED else pair
        second = 2 * pair + 1 if INTERLEAVED else half + pair
        x1 *= scale * tl.load(weight_ptr + first, mask=pair < half, other=0.0).to(tl.float32)[None, :]
        x2 *= scale * tl.load(weight_ptr + second, mask=pair < half, other=0.0).to(tl.float32)[None, :]
        if REST:
            factor = tl.load(weight_ptr + other, mask=other < width, other=0.0).to(tl.float32)
            rest = (wide * scale * factor[None, :]).to(rest.dtype)
    if INTERLEAVED:
        y = tl.reshape(tl.join(x1 * cos - x2 * sin, x2 * cos + x1 * sin), (x1.shape[0], 2 * HALF))
        both = written[:, None] if EVEN else written[:, None] & (column < 2 * half)[None, :]
        tl.store(y_row[:, None] + column[None, :], y.to(y_row.dtype.element_ty), mask=both)
    else:
        tl.store(y_row[:, None] + pair[None, :], (x1 * cos - x2 * sin).to(y_row.dtype.element_ty), mask=store)
        tl.store(y_row[:, None] + half + pair[None, :], (x2 * cos + x1 * sin).to(y_row.dtype.element_ty), mask=store)
    if REST:
        tl.store(y_row[:, None] + other[None, :], rest, mask=written[:, None] & (other < width)[None, :])


@triton.jit
def _rows(
    positions_ptr, lengths_ptr, tokens, length, heads, position_batch, position_token, ROWS: tl.constexpr
):  # fmt: skip
    """(row, sequence, head, place among the new tokens, whether it is one, place in the cache, position) of each row of
    this program's block."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = row // heads
    real = token < tokens
    batch = token // length
    place = token - batch * length
    stored = place
    if lengths_ptr is not None:
        stored += tl.load(lengths_ptr + batch, mask=real, other=0).to(tl.int64)
    # Not `stored` itself, for the reason above: Triton 3.6 may fail to compile a tensor with two uses of other layouts.
    position = place.to(tl.int32)
    if lengths_ptr is not None:
        position += tl.load(lengths_ptr + batch, mask=real, other=0).to(tl.int32)
    if positions_ptr is not None:
        position = tl.load(positions_ptr + batch * position_batch + place * position_token, mask=real, other=0)
    return row, batch, row - token * heads, place, real, stored, position


@triton.jit(do_not_specialize=["tokens", "length", "capacity", "eps"])
def _rotary_kernel(
    x_ptr, key_ptr, value_ptr, y_ptr, key_cache_ptr, value_cache_ptr, weight_ptr, key_weight_ptr, cos_ptr, sin_ptr,
    positions_ptr, lengths_ptr, tokens, length, heads, key_heads, width, half, capacity, eps,
    x_batch, x_token, x_head, key_batch, key_token, key_head, value_batch, value_token, value_head,
    key_cache_batch, key_cache_token, key_cache_head, value_cache_batch, value_cache_token, value_cache_head,
    position_batch, position_token,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
    REST: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Program (block of rows, tensor: x, keys, values). y is contiguous. With keys, token i of sequence b goes to row
    lengths[b] + i of the caches; past their end it is dropped."""
    part = tl.program_id(1)
    # Each branch computes its own rows: Triton 3.6 may fail to compile a tensor that several branches share.
    if part == 0:
        row, batch, head, place, real, _, position = _rows(
            positions_ptr, lengths_ptr, tokens, length, heads, position_batch, position_token, ROWS
        )
        x_row = x_ptr + batch * x_batch + place * x_token + head * x_head
        _rotate_rows(
            x_row, y_ptr + row * width, weight_ptr, cos_ptr, sin_ptr, position, real, real, width, half, eps,
            INTERLEAVED, INVERSE, EVEN, HALF, REST,
        )  # fmt: skip
    if key_ptr is not None:
        if part == 1:
            _, batch, head, place, real, stored, position = _rows(
                positions_ptr, lengths_ptr, tokens, length, key_heads, position_batch, position_token, ROWS
            )
            x_row = key_ptr + batch * key_batch + place * key_token + head * key_head
            y_row = key_cache_ptr + batch * key_cache_batch + stored * key_cache_token + head * key_cache_head
            _rotate_rows(
                x_row, y_row, key_weight_ptr, cos_ptr, sin_ptr, position, real, real & (stored < capacity), width, half,
                eps, INTERLEAVED, INVERSE, EVEN, HALF, REST,
            )  # fmt: skip
        if part == 2:
            _, batch, head, place, real, stored, _ = _rows(
                None, lengths_ptr, tokens, length, key_heads, position_batch, position_token, ROWS
            )
            x_row = value_ptr + batch * value_batch + place * value_token + head * value_head
            y_row = value_cache_ptr + batch * value_cache_batch + stored * value_cache_token + head * value_cache_head
            column = tl.arange(0, COLUMNS)[None, :]
            mask = (real & (stored < capacity))[:, None] & (column < width)
            tl.store(y_row[:, None] + column, tl.load(x_row[:, None] + column, mask=mask, other=0.0), mask=mask)


def rotary(x, cos, sin, positions, interleaved: bool, inverse: bool, y) -> None:
    """Write y. x: (batch, length, heads, width), last stride 1; y: the same, contiguous. cos, sin: float32
    (positions, half), contiguous. positions: int64 (batch, length) or None."""
    _launch(x, None, None, y, None, None, None, None, cos, sin, positions, None, 0.0, interleaved, inverse)


def rotary_append(
    query, key, value, key_cache, value_cache, lengths, cos, sin, positions, query_weight, key_weight, eps: float,
    interleaved: bool, y,
) -> None:  # fmt: skip
    """Write y and rows of the caches from `lengths` on. query, key, value: (batch, length, heads, width), last
    stride 1; y: as query, contiguous; caches: (batch, key heads, capacity, width), last stride 1; lengths: int32 or
    int64 (batch,), contiguous; weights: (width,), contiguous, or None; the others as in `rotary`."""
    caches = (t.transpose(1, 2) for t in (key_cache, value_cache))
    _launch(
        query, key, value, y, *caches, query_weight, key_weight, cos, sin, positions, lengths, eps, interleaved, False
    )  # fmt: skip


def _launch(
    x, key, value, y, key_cache, value_cache, weight, key_weight, cos, sin, positions, lengths, eps, interleaved,
    inverse,
) -> None:  # fmt: skip
    batch, length, heads, width = x.shape
    half, key_heads = cos.shape[1], 1 if key is None else key.shape[2]
    block = max(4, triton.next_power_of_2(half))
    rows = batch * length * max(heads, key_heads)
    warps = 1 if key is not None and rows * width <= FEW else NUM_WARPS
    rest = triton.next_power_of_2(width - 2 * half) if width > 2 * half else 0
    tile = TILE // 2 if key is not None and x.element_size() == 4 else TILE  # float32 appends take more registers
    height = max(1, tile * warps // NUM_WARPS // triton.next_power_of_2(2 * block + rest))
    strides = [s for t in (x, key, value, key_cache, value_cache) for s in ((0, 0, 0) if t is None else t.stride()[:3])]
    strides += (0, 0) if positions is None else positions.stride()
    _rotary_kernel[(triton.cdiv(rows, height), 1 if key is None else 3)](
        x, key, value, y, key_cache, value_cache, weight, key_weight, cos, sin, positions, lengths,
        batch * length, length, heads, key_heads, width, half, 0 if key is None else key_cache.shape[1], eps, *strides,
        INTERLEAVED=interleaved, INVERSE=inverse, EVEN=half == block, ROWS=height, HALF=block,
        REST=rest, COLUMNS=0 if key is None else triton.next_power_of_2(width), num_warps=warps,
    )  # fmt: skip
