"""y = act(x + bias), or act(x + bias) * gate, over rows; forward and backward, one read and one write.

The backward pass computes the activation again from x. Programs walk over rows and keep their share of the bias
gradient in registers; `column_sum` adds the shares in a fixed order: no atomics.

Tile sizes are chosen from register counts of the compiled code, not from timings.
"""

import torch
import triton
import triton.language as tl

from .column_sum import column_sum
from .direct import DIRECT

TILE = 2048  # elements per program of NUM_WARPS warps: 16 per thread
BLOCK = 256  # columns: divides the widths of transformers, so that no lane idles
NUM_WARPS = 4
PROGRAMS = 8  # per multiprocessor, where programs walk over rows


@triton.jit
def _gate_of_gelu_tanh(u):
    """(1 + tanh(z)) / 2 = sigmoid(2 z) and dz/du, for z = sqrt(2 / pi) * (u + 0.044715 u^3)."""
    twice_z = 1.5957691216057308 * u * (1.0 + 0.044715 * u * u)
    return 1.0 / (1.0 + tl.exp(-twice_z)), 0.7978845608028654 * (1.0 + 0.134145 * u * u)


@triton.jit
def _activation(u, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        y = 0.5 * u * (1.0 + tl.erf(0.7071067811865476 * u))
    elif ACTIVATION == "gelu_tanh":
        open, _ = _gate_of_gelu_tanh(u)
        y = u * open
    elif ACTIVATION == "silu":
        y = u / (1.0 + tl.exp(-u))
    else:
        y = tl.where(u < 0.0, 0.0, u)
    return y


@triton.jit
def _activation_and_slope(u, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        open = 0.5 * (1.0 + tl.erf(0.7071067811865476 * u))
        y = u * open
        slope = open + 0.3989422804014327 * u * tl.exp(-0.5 * u * u)
    elif ACTIVATION == "gelu_tanh":
        open, dz = _gate_of_gelu_tanh(u)
        y = u * open
        slope = open + 2.0 * y * (1.0 - open) * dz
    elif ACTIVATION == "silu":
        open = 1.0 / (1.0 + tl.exp(-u))
        y = u * open
        slope = open + y * (1.0 - open)
    else:
        y = tl.where(u < 0.0, 0.0, u)
        slope = tl.where(u <= 0.0, 0.0, 1.0)
    return y, slope


@triton.jit(do_not_specialize=["rows"])
def _bias_activation_forward_kernel(
    x_ptr, bias_ptr, gate_ptr, y_ptr, x_stride, gate_stride, rows, width,
    ACTIVATION: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(width, BLOCK)  # all in grid axis 0: the other axes end at 65535
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    mask = (row < rows)[:, None] if EVEN else (row < rows)[:, None] & inside[None, :]
    u = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        u += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    y = _activation(u, ACTIVATION)
    if gate_ptr is not None:
        y *= tl.load(gate_ptr + row[:, None] * gate_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row[:, None] * width + column[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _bias_activation_backward_kernel(
    grad_ptr, x_ptr, bias_ptr, gate_ptr, grad_x_ptr, grad_gate_ptr, partial_ptr, grad_stride, x_stride, gate_stride,
    rows, width, ACTIVATION: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program p * blocks + c walks over rows p * ROWS, (p + programs) * ROWS, ... of column block c."""
    blocks = tl.cdiv(width, BLOCK)
    program, programs = tl.program_id(0) // blocks, tl.num_programs(0) // blocks
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    grad_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    for first_row in range(program * ROWS, rows, programs * ROWS):
        row = (first_row + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] if EVEN else (row < rows)[:, None] & inside[None, :]
        u = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            u += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        y, slope = _activation_and_slope(u, ACTIVATION)
        grad = tl.load(grad_ptr + row[:, None] * grad_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        out = row[:, None] * width + column[None, :]
        if gate_ptr is not None:
            tl.store(grad_gate_ptr + out, (grad * y).to(grad_gate_ptr.dtype.element_ty), mask=mask)
            along_gate = gate_ptr + row[:, None] * gate_stride + column[None, :]
            grad *= tl.load(along_gate, mask=mask, other=0.0).to(tl.float32)
        grad *= slope
        tl.store(grad_x_ptr + out, grad.to(grad_x_ptr.dtype.element_ty), mask=mask)
        if partial_ptr is not None:
            grad_bias += grad
    if partial_ptr is not None:
        partial = program.to(tl.int64) * width + column
        tl.store(partial_ptr + partial, tl.sum(grad_bias, 0), mask=inside)


REGISTERS = 88  # per thread, 16-bit backward without a gate: ptxas by itself takes fewer, and some kernels spill


def _tile(width: int) -> tuple[int, int]:
    block = min(BLOCK, max(16, triton.next_power_of_2(width)))
    return TILE // block, block


def bias_activation_forward(x, bias, gate, activation: str, y, plan=DIRECT) -> None:
    """Write y. x, gate: (rows, width), unit stride along the width; bias: (width,); y: (rows, width) contiguous.
    activation: "gelu" (erf), "gelu_tanh", "relu" or "silu"."""
    rows, width = x.shape
    tile_rows, block = _tile(width)
    plan.call(
        _bias_activation_forward_kernel, (triton.cdiv(rows, tile_rows) * triton.cdiv(width, block),),
        x, bias, gate, y, x.stride(0), 0 if gate is None else gate.stride(0), rows, width,
        ACTIVATION=activation, EVEN=width % block == 0, ROWS=tile_rows, BLOCK=block, num_warps=NUM_WARPS,
    )  # fmt: skip


def bias_activation_backward(
    grad, x, bias, gate, activation: str, grad_x, grad_bias, grad_gate, multiprocessors: int, plan=DIRECT
) -> None:
    """Write grad_x, grad_gate if there is a gate, and grad_bias if given, each in its dtype.

    grad, x, gate: (rows, width), unit stride along the width; grad_x, grad_gate: (rows, width) contiguous.
    """
    rows, width = x.shape
    tile_rows, block = _tile(width)
    programs, column_blocks = triton.cdiv(rows, tile_rows), triton.cdiv(width, block)
    partial = None
    if grad_bias is not None:
        programs = min(programs, max(1, multiprocessors * PROGRAMS // column_blocks))
        partial = plan.empty((1, programs, width), torch.float32, grad_bias.device)
    plan.call(
        _bias_activation_backward_kernel, (programs * column_blocks,), grad, x, bias, gate, grad_x, grad_gate, partial,
        grad.stride(0), x.stride(0), 0 if gate is None else gate.stride(0), rows, width,
        ACTIVATION=activation, EVEN=width % block == 0, ROWS=tile_rows, BLOCK=block, num_warps=NUM_WARPS,
        maxnreg=REGISTERS if gate is None and x.element_size() == 2 else None,
    )  # fmt: skip
    if partial is not None:
        column_sum(partial, grad_bias, plan=plan)
