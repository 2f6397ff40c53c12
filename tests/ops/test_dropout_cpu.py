"""Dropout on the CPU has exactly the mask of the definition in plain PyTorch, forward and backward."""

import pytest
import torch
from instruction_sets import running_on
from numerics import assert_as_accurate

import transformer_fast as tf
from transformer_fast.backends import native

if native.load():
    pytest.skip(native.load(), allow_module_level=True)


@pytest.fixture(params=native.supported_isas())
def isa(request):
    with running_on(request.param) as isa:
        yield isa


def run(backend, x, p):
    x = x.detach().requires_grad_()
    torch.manual_seed(11)
    with tf.backend(backend):
        y = tf.dropout(x, p)
        (grad,) = torch.autograd.grad(y.sum(), x)
    return y.detach(), grad


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 1), (5, 127), (2, 3, 128), (4, 129), (70, 300), (2, 1000)])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
def test_mask_of_eager(isa, dtype, shape, p):
    x = (1 + torch.rand(shape)).to(dtype)
    (y, grad), (eager, eager_grad) = run("cpu", x, p), run("eager", x, p)
    truth, truth_grad = run("eager", x.double(), p)
    assert torch.equal(y == 0, eager == 0)
    assert torch.equal(grad == 0, eager_grad == 0)
    assert_as_accurate(y, truth, eager)
    assert_as_accurate(grad, truth_grad, eager_grad)


@pytest.mark.quick
def test_strided_and_transposed_inputs(isa):
    wide = 1 + torch.rand(40, 90)
    for x in (wide[:, 5:70], wide[::3], wide.t(), wide[:, ::2], wide[:, 3]):
        assert torch.equal(run("cpu", x, 0.4)[0], run("cpu", x.contiguous(), 0.4)[0])


@pytest.mark.quick
def test_rate_and_independence_of_rows_and_columns():
    dropped = tf.dropout(torch.ones(400, 512), 0.25) == 0
    for rates in (dropped.float().mean(0), dropped.float().mean(1)):
        assert abs(rates.mean() - 0.25) < 0.01
        assert rates.std() < 0.03
