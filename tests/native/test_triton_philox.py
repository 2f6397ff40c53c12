"""Dropout masks of the Triton kernels against the definition, bit for bit."""

import pytest
import torch
import triton_interpreter

from transformer_fast.backends.philox import keep_mask, threshold

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def _interpreted():
    with triton_interpreter.active():
        yield


@pytest.mark.parametrize("p", [0.1, 0.5, 0.999, 1e-4])
@pytest.mark.parametrize("rows, columns, bh, first_row, first_column", [(4, 128, 0, 0, 0), (2, 512, 7, 2**31 - 1, 384)])
def test_mask_bit_for_bit(p, rows, columns, bh, first_row, first_column):
    import triton
    import triton.language as tl
    from transformer_fast.kernels import philox

    @triton.jit
    def kernel(
        rng_ptr, out_ptr, bh, first_row, first_column, threshold,
        KEEP_MASK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        row = first_row.to(tl.int64) + tl.arange(0, ROWS)
        kept = KEEP_MASK(rng_ptr, bh, row, first_column, threshold, ROWS, COLUMNS)
        where = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        tl.store(out_ptr + where, kept.to(tl.int8))

    rng = torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64)
    out = torch.full((rows, columns), -1, dtype=torch.int8)
    kernel[(1,)](rng, out, bh, first_row, first_column, threshold(p), philox.keep_mask, ROWS=rows, COLUMNS=columns)
    i = torch.arange(first_row, first_row + rows)[:, None]
    j = torch.arange(first_column, first_column + columns)[None, :]
    assert torch.equal(out, keep_mask(rng, p, torch.full_like(i, bh), i, j).to(torch.int8))
