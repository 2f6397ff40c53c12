"""Weights in panels for few rows: every instruction set, any number of rows, float32, bfloat16 and int8 storage."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import running_on
from numerics import assert_as_accurate

import transformer_fast as tf
from transformer_fast.backends import eager, native

if native.load():
    pytest.skip(native.load(), allow_module_level=True)


@pytest.fixture(params=native.supported_isas())
def isa(request):
    with running_on(request.param) as isa:
        yield isa


def reference(x, weight, bias, activation):
    y = F.linear(x, weight, bias)
    return y if activation is None else eager.bias_activation(y, None, None, activation)


def held_exactly(w, storage, dtype):
    """A weight near w, in dtype, that the storage dtype represents exactly."""
    if storage != torch.int8:
        w = w.to(storage).to(dtype)
        return w.float().to(storage).to(dtype)
    w = (40 * w).round().clamp(-127, 127)
    w[:, -1] = 127.0 * w[:, -1].sign() + (w[:, -1] == 0) * 127.0
    return (w * 2.0 ** torch.randint(-6, -2, (len(w), 1))).to(dtype)


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_products(isa, dtype, storage):
    @settings(max_examples=20, deadline=None, derandomize=True)
    @given(
        rows=st.sampled_from([1, 2, 3, 5, 7, 8, 9, 31, 32, 33, 70, 130]),
        inner=st.sampled_from([1, 7, 16, 33, 200]),
        outer=st.sampled_from([1, 15, 16, 31, 32, 33, 64, 100]),
        activation=st.sampled_from([None, "gelu", "gelu_tanh", "relu", "silu"]),
        biased=st.booleans(),
        seed=st.integers(0, 1000),
    )
    def property(rows, inner, outer, activation, biased, seed):
        g = torch.Generator().manual_seed(seed)
        x, w = torch.randn(rows, inner, generator=g).to(dtype), torch.randn(outer, inner, generator=g)
        b = torch.randn(outer, generator=g).to(dtype) if biased else None
        w = held_exactly(w, storage, dtype)
        y = tf.linear(x, tf.to_panels(w, storage), b, activation)
        truth = reference(x.double(), w.double(), None if b is None else b.double(), activation)
        assert_as_accurate(y, truth, reference(x, w, b, activation))

    property()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_int8_is_the_nearest_of_255_steps(isa, dtype, transposed):
    w = torch.randn(70, 133) * torch.logspace(-3, 2, 70)[:, None]
    w[5], w[40] = 0.0, 1e-42  # outputs whose scale is zero or subnormal
    w = w.to(dtype)
    panels = tf.to_panels(w.t().contiguous().t() if transposed else w, torch.int8)
    assert panels.data.shape == (3, 137, 32) and panels.shape == w.shape
    scales = panels.data[:, 133:].flatten(1).view(torch.float32).flatten()[:70]
    levels = panels.data[:, :133].transpose(1, 2).flatten(0, 1)[:70].float()
    assert torch.equal(scales, w.float().abs().amax(1) / 127)
    assert (levels.abs().amax(1)[scales > 1e-30] == 127).all() and not levels[5].any()
    # Half a step, and the rounding of w / s.
    assert ((levels * scales[:, None] - w.float()).abs() <= scales[:, None] * (0.5 + 1e-4) + 1e-41).all()
    x = torch.randn(3, 133)
    with tf.backend("eager"):
        plain = tf.linear(x, tf.to_panels(w.float(), torch.int8))
    rounded = levels.double() * scales[:, None].double()
    assert_as_accurate(tf.linear(x, panels), F.linear(x.double(), rounded), F.linear(x, rounded.float()))
    kept = [i for i in range(70) if i != 40]
    assert_as_accurate(plain[:, kept], F.linear(x.double(), rounded)[:, kept], F.linear(x, rounded.float())[:, kept])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_int8_does_not_hide_what_is_no_number(bad):
    w = torch.randn(40, 16)
    w[7, 3] = bad
    y = tf.linear(torch.randn(2, 16), tf.to_panels(w, torch.int8))
    assert not y[:, 7].isfinite().any() and y[:, :7].isfinite().all() and y[:, 8:].isfinite().all()


@pytest.mark.quick
def test_layouts_of_input_and_weight(isa):
    wide, weight = torch.randn(12, 90), torch.randn(40, 33).t()[:, 5:25]
    panels = tf.to_panels(weight)
    assert panels.shape == (33, 20)
    for x in (wide[:, 3:23], wide[::3, :20], wide.t()[:20, :12].t(), wide[0, :20], wide.view(3, 4, 90)[..., :20]):
        truth = F.linear(x.double(), weight.double())
        assert_as_accurate(tf.linear(x, panels), truth, F.linear(x, weight))
    assert tf.linear(wide[:0, :20], panels).shape == (0, 33)


@pytest.mark.quick
def test_a_snapshot_that_knows_when_it_is_stale():
    weight = torch.nn.Parameter(torch.randn(8, 4))
    panels = tf.to_panels(weight)
    assert panels.dtype == torch.float32 and panels.matches(weight)
    assert panels.matches(weight.detach().clone())
    with torch.no_grad():
        weight.add_(1.0)
    assert not panels.matches(weight)
    assert tf.to_panels(weight).matches(weight)
    assert tf.to_panels(weight.detach().bfloat16()).dtype == torch.bfloat16


@pytest.mark.quick
def test_compiles_and_falls_back():
    weight, x = torch.randn(40, 16), torch.randn(3, 16)
    panels = tf.to_panels(weight)
    compiled = torch.compile(lambda x: tf.linear(x, panels, None, "gelu"), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), tf.linear(x, panels, None, "gelu"))
    with tf.backend("eager"):
        plain = tf.to_panels(weight)
    assert torch.equal(tf.linear(x, plain), F.linear(x, weight))


@pytest.mark.quick
def test_no_rows_of_any_strides():
    x = torch.randn(2).as_strided((0, 96), (2, 2))
    assert tf.linear(x, tf.to_panels(torch.randn(8, 96)), None, "silu").shape == (0, 8)
