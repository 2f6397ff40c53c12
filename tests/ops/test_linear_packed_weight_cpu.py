"""Weights packed for few rows: every instruction set, any number of rows, float32 and bfloat16 storage."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_as_accurate

import transformer_fast as tf
from transformer_fast.backends import eager, native

if native.load():
    pytest.skip(native.load(), allow_module_level=True)


@pytest.fixture(params=native.supported_isas())
def isa(request):
    before = native.current_isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


def reference(x, weight, bias, activation):
    y = F.linear(x, weight, bias)
    return y if activation is None else eager.bias_activation(y, None, None, activation)


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16], ids=str)
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
        w = w.to(storage).to(dtype)  # so that storage alone loses nothing
        if dtype == torch.float16 and storage == torch.bfloat16:
            w = w.float().bfloat16().half()
        y = tf.linear(x, tf.pack_weight(w, storage), b, activation)
        truth = reference(x.double(), w.to(storage).double(), None if b is None else b.double(), activation)
        assert_as_accurate(y, truth, reference(x, w, b, activation))

    property()


@pytest.mark.quick
def test_layouts_of_input_and_weight(isa):
    wide, weight = torch.randn(12, 90), torch.randn(40, 33).t()[:, 5:25]
    packed = tf.pack_weight(weight)
    assert packed.shape == (33, 20)
    for x in (wide[:, 3:23], wide[::3, :20], wide.t()[:20, :12].t(), wide[0, :20], wide.view(3, 4, 90)[..., :20]):
        truth = F.linear(x.double(), weight.double())
        assert_as_accurate(tf.linear(x, packed), truth, F.linear(x, weight))
    assert tf.linear(wide[:0, :20], packed).shape == (0, 33)


@pytest.mark.quick
def test_a_snapshot_that_knows_when_it_is_stale():
    weight = torch.nn.Parameter(torch.randn(8, 4))
    packed = tf.pack_weight(weight)
    assert packed.dtype == torch.float32 and packed.matches(weight)
    assert not packed.matches(weight.detach().clone())
    with torch.no_grad():
        weight.add_(1.0)
    assert not packed.matches(weight)
    assert tf.pack_weight(weight).matches(weight)
    assert tf.pack_weight(weight.detach().bfloat16()).dtype == torch.bfloat16


@pytest.mark.quick
def test_compiles_and_falls_back():
    weight, x = torch.randn(40, 16), torch.randn(3, 16)
    packed = tf.pack_weight(weight)
    compiled = torch.compile(lambda x: tf.linear(x, packed, None, "gelu"), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), tf.linear(x, packed, None, "gelu"))
    with tf.backend("eager"):
        plain = tf.pack_weight(weight)
    assert torch.equal(tf.linear(x, plain), F.linear(x, weight))
