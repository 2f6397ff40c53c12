"""The CPU kernels of bias + activation, compared with plain PyTorch on every instruction set of this processor."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import running_on
from numerics import GRADIENT, assert_as_accurate

import transformer_fast as tf
from transformer_fast.backends import native
from transformer_fast.ops.activation import ACTIVATIONS

if native.load():
    pytest.skip(native.load(), allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=native.supported_isas())
def isa(request):
    with running_on(request.param) as isa:
        yield isa


def run(backend, x, bias, gate, grad, activation, dtype=None):
    leaves = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, bias, gate)]
    with tf.backend(backend):
        y = tf.bias_activation(leaves[0], leaves[1], activation, gate=leaves[2])
        found = torch.autograd.grad(y, [t for t in leaves if t is not None], grad.to(y.dtype))
    return y.detach(), found


def check(x, bias, gate, grad, activation):
    ours, eager = (run(b, x, bias, gate, grad, activation) for b in ("cpu", "eager"))
    truth = run("eager", x, bias, gate, grad, activation, torch.float64)
    assert_as_accurate(ours[0], truth[0], eager[0])
    for i, (a, t, e) in enumerate(zip(ours[1], truth[1], eager[1])):
        assert_as_accurate(a, t, e, GRADIENT, name=f"gradient {i}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_backward(isa, dtype):
    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(
        rows=st.sampled_from([1, 2, 5, 33, 70]),
        width=st.sampled_from([1, 3, 16, 31, 64, 100, 257, 768]),
        activation=st.sampled_from(ACTIVATIONS),
        biased=st.booleans(),
        float_bias=st.booleans(),
        gated=st.booleans(),
        scale=st.sampled_from([0.01, 1.0, 4.0]),
        seed=st.integers(0, 1000),
    )
    def property(rows, width, activation, biased, float_bias, gated, scale, seed):
        g = torch.Generator().manual_seed(seed)
        x, gate, grad = (torch.randn(rows, width, generator=g) for _ in range(3))
        bias = scale * torch.randn(width, generator=g).to(torch.float32 if float_bias else dtype)
        check((scale * x).to(dtype), bias if biased else None, gate.to(dtype) if gated else None, grad.to(dtype),
              activation)  # fmt: skip

    property()


@pytest.mark.quick
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_magnitude(isa, activation):
    """Inputs from 2^-60 to 2^20 with both signs, compared per magnitude, so that each magnitude must be accurate."""
    for exponent in [-60, -20, -10, *range(-6, 6), 10, 20]:
        x = (1 + torch.rand(2, 1000)) * 2.0**exponent * torch.tensor([[1.0], [-1.0]])
        # Below -8 the definition's 1 + tanh(u) cancels to 0 even in float64. test_extremes covers those.
        for side in (0, 1) if exponent < 3 else (0,):
            check(x[side : side + 1], None, None, 0.5 + torch.rand(1, 1000), activation)


@pytest.mark.quick
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extremes(isa, activation):
    x = torch.tensor([[3e38, -3e38, 1e20, -1e20, 0.0, -0.0, 1e-40]], requires_grad=True)
    y = tf.bias_activation(x, None, activation)
    (slope,) = torch.autograd.grad(y.sum(), x)
    half = 0.0 if activation == "relu" else 0.5
    assert torch.equal(y[0, :6], torch.tensor([3e38, 0.0, 1e20, 0.0, 0.0, 0.0]))
    assert torch.equal(slope[0, :6], torch.tensor([1.0, 0.0, 1.0, 0.0, half, half]))
    assert tf.bias_activation(torch.full((1, 20), float("nan")), None, activation).isnan().all()
    assert tf.bias_activation(torch.full((1, 20), float("inf")), None, activation).isinf().all()


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_column_slices_of_one_tensor(isa, dtype):
    g = torch.Generator().manual_seed(0)
    wide = torch.randn(4, 9, 134, generator=g).to(dtype)
    grad = torch.randn(4, 9, 134, generator=g).to(dtype)[..., 3:70]
    check(wide[..., :67], torch.randn(67, generator=g), wide[..., 67:], grad, "gelu_tanh")
    check(wide[..., ::2], torch.randn(67, generator=g), None, grad, "silu")


@pytest.mark.quick
def test_same_bits_for_any_number_of_threads():
    x, grad, bias = torch.randn(700, 100), torch.randn(700, 100), torch.randn(100)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            y, found = run("cpu", x, bias, None, grad, "gelu")
            results.append((y, *found))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))


@pytest.mark.quick
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 4)])
def test_empty(shape):
    x, bias = torch.randn(shape, requires_grad=True), torch.randn(shape[-1], requires_grad=True)
    y = tf.bias_activation(x, bias)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape and torch.equal(bias.grad, torch.zeros(shape[-1]))
