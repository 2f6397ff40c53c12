"""Runs the Triton kernels on CPU tensors, in numpy, if there is no GPU.

Triton decides at its import whether its own functions are interpreted. transformers and torch.compile import it, so
conftest imports this file first. Outside `active()` TRITON_INTERPRET is unset, as for users.
"""

import contextlib
import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch

_LOADED = bool(importlib.util.find_spec("triton")) and not torch.cuda.is_available()


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


if _LOADED:
    with _environment():
        import numpy as np
        import triton.language as tl
        from triton.runtime import interpreter


@contextlib.contextmanager
def active() -> Iterator[None]:
    """In this context `backend("triton")` accepts CPU tensors. Skips the test if Triton compiles for a GPU or is
    missing."""
    from transformer_fast import backends

    if not _LOADED:
        pytest.skip("Triton is not installed, or it compiles for a GPU in this process and does not interpret")
    with _environment():
        try:
            yield
        finally:
            backends._select.cache_clear()  # selections in this context do not hold outside


def _widen(handle):
    """Convert bfloat16, which the interpreter stores as uint16 bits, to float32; leave other dtypes unchanged."""
    if not _is_bfloat16(handle):
        return handle
    bits = np.ascontiguousarray(handle.data).astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


def _narrow(handle):
    """Round float32 to the nearest bfloat16, ties to even."""
    values = np.ascontiguousarray(handle.data, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return interpreter.TensorHandle(np.where(np.isnan(values), np.uint16(0x7FC0), rounded), tl.bfloat16)


def _is_bfloat16(value) -> bool:
    return isinstance(value, interpreter.TensorHandle) and value.dtype.scalar == tl.bfloat16


def _compute_in_bfloat16() -> None:
    """Compute bfloat16 operations as a GPU does: in float32, then round. The interpreter would add, multiply and
    compare the bits as integers, which is silently wrong."""
    builder = interpreter.InterpreterBuilder
    same_bits = {np.bitwise_and, np.bitwise_or, np.bitwise_xor}
    comparisons = {np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal}

    def in_float32(name):
        original = getattr(builder, name)

        def wrapped(self, *args):
            result = original(self, *map(_widen, args))
            return _narrow(result) if any(map(_is_bfloat16, args)) else result

        setattr(builder, name, wrapped)

    for name in ("unary_op", "create_fma", "create_rsqrt"):
        in_float32(name)

    binary_op, cast_impl = builder.binary_op, builder.cast_impl
    fp_to_fp, dot = builder.create_fp_to_fp, builder.create_dot

    def new_binary_op(self, lhs, rhs, op):
        if op in same_bits or not (_is_bfloat16(lhs) and _is_bfloat16(rhs)):
            return binary_op(self, lhs, rhs, op)
        result = binary_op(self, _widen(lhs), _widen(rhs), op)
        return result if op in comparisons else _narrow(result)

    def new_cast_impl(self, source, to):
        if to.scalar == tl.bfloat16:
            return source if _is_bfloat16(source) else _narrow(source)
        source = _widen(source)
        return source if source.dtype.scalar == to.scalar == tl.float32 else cast_impl(self, source, to)

    def new_fp_to_fp(self, source, to, rounding):
        bfloat16 = _is_bfloat16(source) or to.scalar == tl.bfloat16
        if not bfloat16 or rounding == interpreter._ir.ROUNDING_MODE.RTZ:
            return fp_to_fp(self, source, to, rounding)
        return new_cast_impl(self, source, to)

    def new_dot(self, a, b, accumulator, *rest):
        result = dot(self, _widen(a), _widen(b), _widen(accumulator), *rest)
        return _narrow(result) if _is_bfloat16(accumulator) else result

    builder.binary_op, builder.cast_impl = new_binary_op, new_cast_impl
    builder.create_fp_to_fp, builder.create_dot = new_fp_to_fp, new_dot


def _multiply_float32_in_order() -> None:
    """Compute exact float32 products as a GPU does: by fused multiply-adds in the order of K, so that A B^T and
    (B A^T)^T have the same bits. numpy's library chooses the order of sums by the layout."""
    builder = interpreter.InterpreterBuilder
    dot = builder.create_dot

    def new_dot(self, a, b, accumulator, input_precision, *rest):
        exact = input_precision == interpreter._ir.INPUT_PRECISION.IEEE
        if not exact or any(t.dtype.scalar != tl.float32 for t in (a, b, accumulator)):
            return dot(self, a, b, accumulator, input_precision, *rest)
        total = accumulator.data
        left, right = a.data.astype(np.float64), b.data.astype(np.float64)
        for k in range(left.shape[-1]):  # in float64 the product is exact, and the sum almost
            total = (total + left[..., k, None] * right[..., k, None, :]).astype(np.float32)
        return interpreter.TensorHandle(total, tl.float32)

    builder.create_dot = new_dot


if _LOADED:
    _compute_in_bfloat16()
    _multiply_float32_in_order()
