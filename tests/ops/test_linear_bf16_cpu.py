"""The products of bfloat16 in matrix tiles, and which calls of linear they take."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import running_on
from numerics import GRADIENT, assert_as_accurate

import transformer_fast as tf
from transformer_fast.backends import eager, gemm, native

if native.load():
    pytest.skip(native.load(), allow_module_level=True)

CODES = {None: -1, "gelu": 0, "gelu_tanh": 1, "relu": 2, "silu": 3}


def reference(x, weight, bias, activation):
    y = F.linear(x, weight, bias)
    return y if activation is None else eager.bias_activation(y, None, None, activation)


def product(x, weight, bias, activation):
    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype)
    torch.ops.transformer_fast.cpu_linear_bf16.default(x, weight, bias, CODES[activation], y)
    return y


def matrix(rows, columns, transposed, generator):
    """(rows, columns), a part of a wider matrix whose other values are NaN."""
    shape = (columns, rows) if transposed else (rows, columns)
    wide = torch.full((shape[0], shape[1] + 3), torch.nan, dtype=torch.bfloat16)
    wide[:, : shape[1]] = torch.randn(shape, generator=generator)
    part = wide[:, : shape[1]]
    return part.t() if transposed else part


def tensors(rows, inner, outer, biased, seed=0, transposed=(False, False)):
    g = torch.Generator().manual_seed(seed)
    x, weight = matrix(rows, inner, transposed[0], g), matrix(outer, inner, transposed[1], g)
    bias = torch.randn(outer, generator=g).bfloat16() if biased else None
    return x, weight.mul_(inner**-0.5), bias


@pytest.mark.quick
@pytest.mark.parametrize("isa", native.ISAS)
def test_drawn(isa):
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(
        rows=st.sampled_from([1, 3, 15, 16, 17, 32, 33, 49, 100, 129, 150, 200]),
        inner=st.sampled_from([1, 2, 31, 32, 33, 64, 100, 300, 1030]),
        outer=st.sampled_from([1, 15, 16, 17, 33, 63, 64, 65, 130, 200]),
        transposed=st.tuples(st.booleans(), st.booleans()),
        activation=st.sampled_from(list(CODES)),
        biased=st.booleans(),
        seed=st.integers(0, 1000),
    )
    def property(rows, inner, outer, transposed, activation, biased, seed):
        inputs = tensors(rows, inner, outer, biased, seed, transposed)
        truth = reference(*(None if t is None else t.double() for t in inputs), activation)
        assert_as_accurate(product(*inputs, activation), truth, truth.bfloat16())

    with running_on(isa):
        property()


@pytest.mark.parametrize("rows", [20, 140])
@pytest.mark.parametrize("transposed", [(False, False), (True, True)])
@pytest.mark.parametrize("isa", native.ISAS)
def test_infinities_and_nan_stay_in_their_rows_and_columns(isa, transposed, rows):
    x, weight, bias = tensors(rows, 70, 90, True, 0, transposed)
    x[3, 5], x[-1, 69], weight[7, 69] = torch.inf, torch.nan, torch.nan
    with running_on(isa):
        y = product(x, weight, bias, None)
    assert y[-1].isnan().all() and y[:, 7].isnan().all()
    rest = y[:-1, [c for c in range(90) if c != 7]]
    assert torch.equal(rest.isfinite().all(1), torch.arange(rows - 1) != 3) and not rest.isnan().any()


@pytest.mark.parametrize("rows, outer", [(40, 400), (300, 40), (150, 400)])
@pytest.mark.parametrize("threads", [2, 3])
def test_results_do_not_depend_on_the_number_of_threads(threads, rows, outer):
    inputs = tensors(rows, 100, outer, True)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        wanted = product(*inputs, "gelu")
        torch.set_num_threads(threads)
        assert torch.equal(product(*inputs, "gelu"), wanted)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("transposed", [(False, False), (True, False)])
def test_more_rows_than_are_laid_out_at_a_time(transposed):
    inputs = tensors(1700, 3100, 40, True, 0, transposed)
    truth = reference(*(t.double() for t in inputs), None)
    assert_as_accurate(product(*inputs, None), truth, truth.bfloat16())


@pytest.fixture
def taken(monkeypatch):
    """The calls that the kernel gets, on a processor that is said to have tiles."""
    from transformer_fast import backends

    calls = []
    kernel = gemm.in_tiles

    def spy(*arguments):
        calls.append(tuple(arguments[0].shape))
        return kernel(*arguments)

    monkeypatch.setattr(native, "current_isa", lambda: "avx512_amx")
    monkeypatch.setattr(gemm, "in_tiles", spy)
    backends._select.cache_clear()
    yield calls
    backends._select.cache_clear()


@pytest.mark.quick
@pytest.mark.parametrize("activation", list(CODES))
@pytest.mark.parametrize("shape", [(40,), (1, 40), (2, 9, 40)])
def test_linear_takes_it(taken, shape, activation):
    _, weight, bias = tensors(1, 40, 96, True)
    x = torch.randn(*shape).bfloat16()
    with torch.no_grad():
        y = tf.linear(x, weight, bias, activation)
        together = tf.projections(x, [weight, weight[:64]], [bias, None])
    assert len(taken) == 3 and y.shape == (*shape[:-1], 96)
    truth = [t.double() for t in (x, weight, bias)]
    for found, wanted in (
        (y, reference(*truth, activation)),
        (together[0], reference(*truth, None)),
        (together[1], reference(truth[0], truth[1][:64], None, None)),
    ):
        assert_as_accurate(found, wanted, wanted.bfloat16())


def gradients(call, inputs, dtype=None):
    leaves = [t.detach().clone().to(dtype or t.dtype).requires_grad_() for t in inputs]
    y = call(*leaves)
    return torch.autograd.grad((y.double() * torch.arange(y.numel()).view(y.shape).sin()).sum(), leaves)


def compare_gradients(call, plain, inputs):
    ours, theirs, truth = gradients(call, inputs), gradients(plain, inputs), gradients(plain, inputs, torch.float64)
    for name, a, t, e in zip(("input", "weight", "bias"), ours, truth, theirs):
        assert_as_accurate(a, t, e, GRADIENT, name)


@pytest.mark.quick
@pytest.mark.parametrize("activation", [None, "gelu", "relu"])
def test_gradients_are_its_products_too(taken, activation):
    inputs = [t.contiguous() for t in tensors(150, 40, 96, True)]

    def call(*leaves):
        return tf.linear(*leaves, activation)

    def plain(*leaves):
        return reference(*leaves, activation)

    compare_gradients(call, plain, inputs)
    assert len(taken) == 3


@pytest.mark.quick
def test_several_projections_and_their_gradients(taken):
    x, weight, bias = (t.contiguous() for t in tensors(150, 40, 96, True))

    def call(x, weight, bias):
        return torch.cat(tf.projections(x, [weight, weight[:64]], [bias, None]), 1)

    def plain(x, weight, bias):
        return torch.cat([F.linear(x, weight, bias), F.linear(x, weight[:64])], 1)

    compare_gradients(call, plain, (x, weight, bias))
    assert len(taken) == 6


@pytest.mark.quick
def test_linear_leaves_other_calls_to_torch(taken):
    x, weight, bias = (t.contiguous() for t in tensors(30, 40, 96, True))
    calls = {
        "a weight with gaps": (x, torch.randn(96, 80).bfloat16()[:, ::2], bias),
        "few outputs": (x, weight[:3], bias[:3]),
        "float16": (x.half(), weight.half(), bias.half()),
        "float32": (x.float(), weight.float(), bias.float()),
    }
    with torch.no_grad():
        for call in calls.values():
            assert tf.linear(*call, "gelu").shape == (30, call[1].shape[0])
        with tf.backend("eager"):
            tf.linear(x, weight, bias)
    with torch.autocast("cpu", torch.bfloat16):
        tf.linear(x.float(), weight.float(), bias.float())
        tf.projections(x.float(), [weight.float()])
    assert not taken
