"""Rotary embedding against plain PyTorch in float64: the CPU kernels on every instruction set, Triton's under its
interpreter and CUDA's under the emulator (or on a GPU). Also the properties that models rely on."""

import contextlib

import cuda_emulator
import pytest
import rotary_cases
import torch
import triton_interpreter
from hypothesis import given, settings

import transformer_fast as tf
from transformer_fast.backends import native

needs_native = pytest.mark.skipif(bool(native.load()), reason=native.load() or "there")
ISAS = [] if native.load() else native.supported_isas()
BACKENDS = [*(pytest.param(("cpu", isa), marks=needs_native, id=isa) for isa in ISAS), ("triton", ""), ("cuda", "")]


@contextlib.contextmanager
def _using(backend, isa, device):
    if backend == "cpu":
        before = native.current_isa()
        native.set_isa(isa)
        try:
            yield "cpu"
        finally:
            native.set_isa(before)
    elif device == "cuda":
        yield "cuda"
    else:
        with triton_interpreter.active() if backend == "triton" else cuda_emulator.active():
            yield "cpu"


@pytest.mark.quick
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_drawn_calls(backend, device):
    name, isa = backend

    @settings(max_examples=60 if name == "cpu" else 25, deadline=None, derandomize=True)
    @given(call=rotary_cases.calls())
    def drawn(call):
        shape, dtype, features = call
        rotary_cases.check(name, shape, dtype, device=where, **features)

    with _using(name, isa, device) as where:
        drawn()


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_a_model_s_shape(backend, device, interleaved):
    name, isa = backend
    with _using(name, isa, device) as where:
        rotary_cases.check(name, (2, 33, 12, 128), torch.bfloat16, interleaved=interleaved, device=where)


def test_is_what_transformers_computes():
    from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as interleaved
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as halves

    x, (cos, sin) = torch.randn(2, 5, 3, 16), rotary_cases.tables(5, 8)
    wide = [torch.cat((t, t), -1)[None] for t in (cos, sin)]
    torch.testing.assert_close(tf.rotary_embedding(x, cos, sin), halves(x, x, *wide, unsqueeze_dim=2)[0])
    every = [t[None].expand(2, -1, -1) for t in (sin, cos)]
    torch.testing.assert_close(tf.rotary_embedding(x, cos, sin, interleaved=True), interleaved(x, *every))


def test_unpadded_rows_and_positions_of_any_shape():
    x, (cos, sin) = torch.randn(2, 5, 3, 16), rotary_cases.tables(9, 8)
    positions = torch.tensor([4, 0, 8, 1, 1])
    whole = tf.rotary_embedding(x, cos, sin, positions.expand(2, 5))
    for given_positions in (positions, positions[None], positions.int()):
        assert torch.equal(tf.rotary_embedding(x, cos, sin, given_positions), whole)
    unpadded = tf.rotary_embedding(x.flatten(0, 1), cos, sin, positions.repeat(2))
    assert torch.equal(unpadded, whole.flatten(0, 1))


def test_rotating_back_gives_the_input():
    x, angles = torch.randn(2, 5, 3, 16, dtype=torch.float64), torch.rand(5, 8, dtype=torch.float64)
    there = tf.rotary_embedding(x, angles.cos(), angles.sin())
    torch.testing.assert_close(tf.rotary_embedding(there, angles.cos(), angles.sin(), inverse=True), x)


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients_of_gradients(interleaved):
    x = torch.randn(2, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    cos, sin = (t.double() for t in rotary_cases.tables(3, 3))

    def call(x):
        return tf.rotary_embedding(x, cos, sin, interleaved=interleaved)

    assert torch.autograd.gradcheck(call, x) and torch.autograd.gradgradcheck(call, x)


def test_opcheck():
    x, (cos, sin) = torch.randn(2, 5, 3, 16, requires_grad=True), rotary_cases.tables(9, 8)
    positions = torch.zeros(2, 5, dtype=torch.int64)
    torch.library.opcheck(torch.ops.transformer_fast.rotary_embedding.default, (x, cos, sin, positions, False, False))


@pytest.mark.parametrize("shape", [(0, 3, 2, 8), (2, 0, 2, 8), (2, 3, 0, 8), (2, 3, 2, 0)])
def test_empty(shape):
    x = torch.randn(shape, requires_grad=True)
    y = tf.rotary_embedding(x, *rotary_cases.tables(3, shape[-1] // 2))
    y.sum().backward()
    assert y.shape == x.grad.shape == shape


X, COS = torch.randn(2, 5, 3, 16), torch.randn(9, 8)
BAD = {
    "input type": (([1.0], COS, COS), TypeError, "input: wanted a tensor, got list"),
    "input dtype": ((X.long(), COS, COS), TypeError, "input.*int64"),
    "input rank": ((X[0, 0], COS, COS), ValueError, r"input: wanted \(B, S, H, D\).*\(3, 16\)"),
    "cos type": ((X, None, COS), TypeError, "cos: wanted a tensor, got NoneType"),
    "cos rank": ((X, COS[0], COS), ValueError, r"cos: wanted shape \(positions, R / 2\), got \(8,\)"),
    "cos device": ((X, COS.to("meta"), COS), ValueError, "cos: is on meta"),
    "cos gradient": ((X, COS.clone().requires_grad_(), COS), ValueError, "cos: gets no gradient"),
    "sin shape": ((X, COS, COS[:3]), ValueError, r"sin: wanted the shape of cos \(9, 8\), got \(3, 8\)"),
    "wide": ((X[..., :14], COS, COS), ValueError, "cos: wanted at most 7 columns"),
    "short": ((X, COS[:4], COS[:4]), ValueError, "cos: wanted a row for each of the 5 positions, got 4"),
    "positions type": ((X, COS, COS, [0]), TypeError, "positions.*list"),
    "positions dtype": ((X, COS, COS, torch.zeros(5)), TypeError, "positions.*float32"),
    "positions shape": ((X, COS, COS, torch.zeros(2, 4).long()), ValueError, r"positions.*\(2, 5\).*\(2, 4\)"),
    "positions value": ((X, COS, COS, torch.tensor([0, 1, 2, 3, 9])), ValueError, r"positions.*\[0, 9\).*0\.\.9"),
    "negative": ((X, COS, COS, torch.tensor([0, -1, 2, 3, 4])), ValueError, r"positions.*-1\.\.4"),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    arguments, error, message = BAD[name]
    with pytest.raises(error, match=message):
        tf.rotary_embedding(*arguments)
