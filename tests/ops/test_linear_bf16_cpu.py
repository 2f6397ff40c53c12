"""The kernel for few rows in bfloat16, and which calls of linear it takes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import running_on
from numerics import assert_as_accurate

import transformer_fast as tf
from transformer_fast.backends import eager, gemm, native

if native.load():
    pytest.skip(native.load(), allow_module_level=True)

CODES = {None: -1, "gelu": 0, "gelu_tanh": 1, "relu": 2, "silu": 3}


def reference(x, weight, bias, activation):
    y = torch.nn.functional.linear(x, weight, bias)
    return y if activation is None else eager.bias_activation(y, None, None, activation)


def product(x, weight, bias, activation):
    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype)
    torch.ops.transformer_fast.cpu_linear_bf16.default(x, weight, bias, CODES[activation], y)
    return y


def tensors(rows, inner, outer, biased, seed=0):
    """Rows and weight of wider tensors whose other values are NaN."""
    g = torch.Generator().manual_seed(seed)
    x, weight = torch.full((rows, inner + 3), torch.nan), torch.full((outer, inner + 5), torch.nan)
    x[:, :inner], weight[:, :inner] = torch.randn(rows, inner, generator=g), torch.randn(outer, inner, generator=g)
    bias = torch.randn(outer, generator=g).bfloat16() if biased else None
    return x.bfloat16()[:, :inner], (weight / inner**0.5).bfloat16()[:, :inner], bias


@pytest.mark.quick
@pytest.mark.parametrize("isa", native.ISAS)
def test_drawn(isa):
    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(
        rows=st.sampled_from([1, 3, 15, 16, 17, 32, 33, 49, 100]),
        inner=st.sampled_from([1, 2, 31, 32, 33, 64, 100, 300]),
        outer=st.sampled_from([1, 15, 16, 17, 63, 64, 65, 130, 200]),
        activation=st.sampled_from(list(CODES)),
        biased=st.booleans(),
        seed=st.integers(0, 1000),
    )
    def property(rows, inner, outer, activation, biased, seed):
        inputs = tensors(rows, inner, outer, biased, seed)
        truth = reference(*(None if t is None else t.double() for t in inputs), activation)
        assert_as_accurate(product(*inputs, activation), truth, truth.bfloat16())

    with running_on(isa):
        property()


@pytest.mark.parametrize("isa", native.ISAS)
def test_infinities_and_nan_stay_in_their_rows_and_columns(isa):
    x, weight, bias = tensors(20, 70, 90, True)
    x[3, 5], x[19, 69], weight[7, 69] = torch.inf, torch.nan, torch.nan
    with running_on(isa):
        y = product(x, weight, bias, None)
    assert y[19].isnan().all() and y[:, 7].isnan().all()
    rest = y[:19, [c for c in range(90) if c != 7]]
    assert torch.equal(rest.isfinite().all(1), torch.arange(19) != 3) and not rest.isnan().any()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_do_not_depend_on_the_number_of_threads(threads):
    inputs = tensors(40, 100, 400, True)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        wanted = product(*inputs, "gelu")
        torch.set_num_threads(threads)
        assert torch.equal(product(*inputs, "gelu"), wanted)
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def taken(monkeypatch):
    """The calls that the kernel gets, on a processor that is said to have tiles."""
    from transformer_fast import backends

    calls = []
    kernel = gemm.few_rows

    def spy(*arguments):
        calls.append(tuple(arguments[0].shape))
        return kernel(*arguments)

    monkeypatch.setattr(native, "current_isa", lambda: "avx512_amx")
    monkeypatch.setattr(gemm, "few_rows", spy)
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


@pytest.mark.quick
def test_linear_leaves_other_calls_to_torch(taken):
    x, weight, bias = (t.contiguous() for t in tensors(300, 40, 96, True))
    calls = {
        "many rows": (x, weight, bias),
        "a transposed weight": (x[:4], weight.t().contiguous().t(), bias),
        "float16": (x[:4].half(), weight.half(), bias.half()),
        "float32": (x[:4].float(), weight.float(), bias.float()),
    }
    with torch.no_grad():
        for call in calls.values():
            tf.linear(*call)
        with tf.backend("eager"):
            tf.linear(x[:4], weight, bias)
        with torch.autocast("cpu", torch.bfloat16):
            tf.linear(x[:4].float(), weight.float(), bias.float())
    with_gradient = tf.linear(x[:4], weight.requires_grad_(), bias)
    assert not taken and with_gradient.requires_grad
