"""The Triton dropout kernel has exactly the mask of the definition."""

import contextlib

import pytest
import torch
import triton_interpreter

import transformer_fast as tf


@pytest.fixture(autouse=True)
def _on_the_device(device):
    with contextlib.nullcontext() if device == "cuda" else triton_interpreter.active():
        yield


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 5, 40), (11, 300), (1,)])
def test_same_values_and_gradient_as_plain_pytorch(device, dtype, shape):
    x = torch.randn(shape, device=device).to(dtype)
    grad = torch.randn(shape, device=device).to(dtype)

    def run(backend, x):
        x = x.detach().requires_grad_()
        torch.manual_seed(11)
        with tf.backend(backend):
            y = tf.dropout(x, 0.3)
            return y, *torch.autograd.grad(y, x, grad)

    for ours, plain in zip(run("triton", x), run("eager", x)):
        assert torch.equal(ours, plain)


def test_rows_of_a_transposed_tensor(device):
    x = torch.randn(20, 6, device=device).T
    with tf.backend("triton"):
        torch.manual_seed(3)
        ours = tf.dropout(x, 0.5)
        torch.manual_seed(3)
        assert torch.equal(ours, tf.dropout(x.contiguous(), 0.5))
