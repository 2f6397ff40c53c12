"""A call like one that has passed its checks is launched at once: with other data, and never a call of another kind."""

import pytest
import torch
from remembered_cases import CALLS, check_repeats
from torch.utils._python_dispatch import TorchDispatchMode

import transformer_fast as tf
from transformer_fast.backends import native, remembered


@pytest.fixture(autouse=True)
def nothing_remembered():
    remembered.forget()
    yield
    remembered.forget()


@pytest.mark.skipif(bool(native.load()), reason="needs the native library")
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_repeated_on_the_cpu(name, gradients):
    check_repeats("cpu", name, "cpu", torch.bfloat16, gradients)
    elsewhere = (name, gradients) == ("attention", False) or name in ("qkv", "unpadded")  # or not remembered at all
    assert remembered._calls or elsewhere


def test_a_remembered_call_lets_nothing_wrong_pass():
    x, w = torch.randn(4, 64), torch.randn(64)
    for _ in range(2):
        tf.layer_norm(x, (64,), w)
        tf.bias_activation(x, w)
    for wrong in (
        lambda: tf.layer_norm(x, (32,), w), lambda: tf.layer_norm(x, (64,), w[:32]), lambda: tf.layer_norm(x, 64.0, w),
        lambda: tf.layer_norm(x, (64,), w.double()), lambda: tf.layer_norm(x.long(), (64,), w),
        lambda: tf.layer_norm(x, (64,), w, eps=-1.0), lambda: tf.layer_norm(x.to_sparse(), (64,), w),
        lambda: tf.layer_norm(x, (64,), w.to("meta")), lambda: tf.bias_activation(x, w, "tanh"),
        lambda: tf.bias_activation(x, w[None]), lambda: tf.bias_activation(x, w, gate=x[:2]),
        lambda: tf.add_layer_norm(x, x[:2], w), lambda: tf.bias_activation([1.0], w),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError)):
            wrong()


def test_what_else_decides_about_a_call_is_looked_at_each_time():
    x, w = torch.randn(4, 64), torch.randn(64)
    for _ in range(2):
        y = tf.layer_norm(x, (64,), w)
    strided = torch.randn(64, 4).t()
    torch.testing.assert_close(tf.layer_norm(strided, (64,), w), torch.nn.functional.layer_norm(strided, (64,), w))
    with tf.backend("eager"):
        torch.testing.assert_close(tf.layer_norm(x, (64,), w), y)
    with pytest.raises(RuntimeError, match="sdpa"), tf.backend("sdpa"):
        tf.layer_norm(x, (64,), w)
    asked = []

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(self, function, kinds, arguments=(), options=None):
            asked.append(str(function))
            return function(*arguments, **(options or {}))

    with Noted():
        tf.layer_norm(x, (64,), w)
    assert "transformer_fast.norm.default" in asked
    leaf = w.clone().requires_grad_()
    assert tf.layer_norm(x, (64,), leaf).requires_grad and not tf.layer_norm(x, (64,), w).requires_grad
    with torch.no_grad():
        assert not tf.layer_norm(x, (64,), leaf).requires_grad
    assert torch.func.grad(lambda w: tf.layer_norm(x, (64,), w).sum())(w).shape == w.shape
    sparse = tf.add_layer_norm(x, x, w, dropout_p=0.5)[1]
    assert (sparse == x).any() and (sparse != x).any()


def test_gradients_of_gradients_of_a_remembered_call():
    x, w, b = torch.randn(3, 8).double(), torch.randn(8).double(), torch.randn(8).double()
    for t in (x, w, b):
        t.requires_grad_()
    for _ in range(2):
        assert torch.autograd.gradgradcheck(lambda *t: tf.layer_norm(t[0], (8,), *t[1:]), (x, w, b))
        assert torch.autograd.gradgradcheck(lambda *t: tf.bias_activation(*t, "gelu"), (x, b))
