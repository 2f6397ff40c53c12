"""The interpreter under which the kernels are tested computes as a GPU, bfloat16 included."""

import pytest
import torch
import triton_interpreter

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def _interpreted():
    with triton_interpreter.active():
        yield


def _elementwise():
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
        i = tl.arange(0, N)
        a, b = tl.load(a_ptr + i), tl.load(b_ptr + i)
        tl.store(out_ptr + i, a + b)
        tl.store(out_ptr + N + i, a * b)
        tl.store(out_ptr + 2 * N + i, tl.where(a < b, a, b))
        tl.store(out_ptr + 3 * N + i, -a)
        tl.store(out_ptr + 4 * N + i, (a.to(tl.float32) * 3.0).to(out_ptr.dtype.element_ty))
        tl.store(out_ptr + 5 * N + i, tl.maximum(a, b))

    return kernel


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_arithmetic_is_torchs(dtype):
    a, b = (torch.randn(64) * 10).to(dtype), torch.randn(64).to(dtype)
    out = torch.full((6, 64), float("nan"), dtype=dtype)
    _elementwise()[(1,)](a, b, out, N=64)
    wanted = torch.stack([a + b, a * b, torch.minimum(a, b), -a, (a.float() * 3.0).to(dtype), torch.maximum(a, b)])
    assert torch.equal(out, wanted)


def test_bfloat16_dot_accumulates_in_float32():
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
        i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
        tl.store(out_ptr + i * N + j, tl.dot(tl.load(a_ptr + i * N + j), tl.load(b_ptr + i * N + j)))

    a, b = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16()
    out = torch.full((16, 16), float("nan"))
    kernel[(1,)](a, b, out, N=16)
    torch.testing.assert_close(out, a.float() @ b.float())


def test_rounding_to_bfloat16_is_to_nearest_even():
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(x_ptr, out_ptr, N: tl.constexpr):
        i = tl.arange(0, N)
        tl.store(out_ptr + i, tl.load(x_ptr + i).to(tl.bfloat16))

    bits = torch.randint(-(2**31), 2**31 - 1, (4096,), dtype=torch.int64).to(torch.int32)
    bits[:2048] = (bits[:2048] & ~0xFFFF) | 0x8000  # ties
    x = bits.view(torch.float32)
    out = torch.empty(4096, dtype=torch.bfloat16)
    kernel[(1,)](x, out, N=4096)
    assert torch.equal(out.isnan(), x.isnan())
    assert torch.equal(out[~x.isnan()], x[~x.isnan()].bfloat16())


def test_leaves_the_environment_alone():
    import os

    with triton_interpreter.active():
        assert os.environ["TRITON_INTERPRET"] == "1"
    assert os.environ["TRITON_INTERPRET"] == "1"  # the fixture's own
