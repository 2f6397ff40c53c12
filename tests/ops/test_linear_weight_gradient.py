"""The gradients of a weight, g^T x, and of a bias: the kernels of every instruction set against torch's product."""

import pytest
import torch
from instruction_sets import running_on
from numerics import GRADIENT, assert_as_accurate

from transformer_fast.backends import gemm, native

if native.load():
    pytest.skip(native.load(), allow_module_level=True)

# (rows, out, in): one of each, partial strips and panels, several ranges of columns, several running sums of rows
SHAPES = [(1, 1, 1), (3, 49, 65), (130, 48, 64), (257, 1000, 30), (600, 70, 333), (37, 2, 520), (300, 530, 17)]


@pytest.mark.parametrize("isa", native.supported_isas())
def test_products_and_sums(isa):
    generator = torch.Generator().manual_seed(0)
    with running_on(isa):
        for rows, out, inner in SHAPES:
            g = torch.randn(rows, out + 5, generator=generator)[:, 3:-2]
            x = torch.rand(rows, inner + 2, generator=generator)[
                :, 1:-1
            ]  # numbers of one sign, whose errors grow with the length of a sum
            found, sums = (torch.full(shape, float("nan")) for shape in ((out, inner), (out,)))
            assert gemm.weight_gradient(g, x, sums, found) is found
            name = str((rows, out, inner))
            assert_as_accurate(found, g.double().t() @ x.double(), g.t() @ x, GRADIENT, name)
            assert_as_accurate(sums, g.double().sum(0), g.sum(0), GRADIENT, name)
            assert torch.equal(gemm.weight_gradient(g, x), found)
            assert torch.equal(gemm.gradient(g.t(), x.t()), found)


def test_same_bits_on_any_number_of_threads():
    g, x, before, found = torch.randn(300, 700), torch.randn(300, 400), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            sums = torch.empty(700)
            found.append((gemm.weight_gradient(g, x, sums), sums))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


def test_what_it_does_not_take():
    g, x = torch.randn(4, 6), torch.randn(4, 8)
    assert not gemm.why_not_own_weight_gradient(g, x)
    assert "float32" in gemm.why_not_own_weight_gradient(g.double(), x.double())
    assert "contiguous" in gemm.why_not_own_weight_gradient(torch.randn(6, 4).t(), x)
    reasons = []
    torch.func.vmap(lambda g: (reasons.append(gemm.why_not_own_weight_gradient(g, x)), g)[1])(torch.randn(2, 4, 6))
    assert reasons == ["a batched tensor"]


def test_nothing_is_hidden():
    """NaN in a row of g or x reaches exactly the results that depend on it."""
    g, x = torch.randn(200, 100), torch.randn(200, 90)
    g[150, 60], x[10, 70] = float("nan"), float("inf")
    sums = torch.empty(100)
    found = gemm.weight_gradient(g, x, sums)
    wanted = torch.zeros(100, 90, dtype=torch.bool)
    wanted[60], wanted[:, 70] = True, True
    assert torch.equal(~found.isfinite(), wanted)
    assert (~sums.isfinite()).nonzero().flatten().tolist() == [60]
