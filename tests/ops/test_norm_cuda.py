"""The CUDA norm kernels against float64: on a GPU if there is one, else under the emulator."""

import contextlib

import cuda_emulator
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from norm_cases import NAMES, check, run
from numerics import GRADIENT, OUTPUT, assert_as_accurate
from remembered_cases import check_repeats

import transformer_fast as tf
from transformer_fast.backends import Call, memory, remembered
from transformer_fast.backends.cuda import BACKEND
from transformer_fast.backends.philox import keep_mask_2d, keep_scale
from transformer_fast.backends.specs import NormSpec

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _on_the_device(device):
    with contextlib.nullcontext() if device == "cuda" else cuda_emulator.active():
        yield


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("add, p", [(False, 0.0), (True, 0.0), (True, 0.3), (False, 0.5)])
def test_features(device, dtype, rms, add, p):
    check("cuda", device, 7, 96, dtype, rms=rms, add=add, p=p)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def _drawn(device, data):
    check(
        "cuda",
        device,
        data.draw(st.integers(1, 150), label="rows"),
        data.draw(st.integers(1, 40).map(lambda n: 8 * n) | st.integers(3, 300), label="width"),
        data.draw(st.sampled_from(DTYPES), label="dtype"),
        rms=data.draw(st.booleans(), label="rms"),
        add=data.draw(st.booleans(), label="add"),
        p=data.draw(st.sampled_from([0.0, 0.0, 0.1, 0.9]), label="p"),
        affine=data.draw(st.tuples(st.booleans(), st.booleans()), label="affine"),
        stride=data.draw(st.sampled_from([0, 0, 1, 16]), label="stride"),
        parameter_dtype=data.draw(st.sampled_from([None, torch.float32]), label="parameter_dtype"),
    )


def test_drawn_shapes(device):
    _drawn(device)


# From 4 threads to 16 warps per row, 1 to 4 vectors per thread, and rows too wide for registers.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, width", [(1, 5), (37, 16), (21, 64), (9, 512), (70, 768), (7, 1024), (6, 2304),
                                         (5, 4096), (5, 8192), (5, 8200), (2, 16400)])  # fmt: skip
def test_widths(device, dtype, rows, width):
    check("cuda", device, rows, width, dtype, add=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("rows, width, p", [(9, 1000, 0.2), (9, 1001, 0.0), (3, 3001, 0.2), (2, 16400, 0.2)])
def test_wide_and_unaligned_rows(device, dtype, rms, rows, width, p):
    check("cuda", device, rows, width, dtype, rms=rms, add=True, p=p, parameter_dtype=torch.float32)


def test_a_row_that_starts_between_vectors(device):
    """Width and strides would allow 16-byte vectors, but the address is not aligned."""
    x = torch.randn(9 * 64 + 1, device=device, dtype=torch.bfloat16)[1:].view(9, 64)
    with tf.backend("cuda"):
        y = tf.layer_norm(x, 64)
    with tf.backend("eager"):
        assert_as_accurate(y, tf.layer_norm(x.double(), 64), tf.layer_norm(x, 64), OUTPUT, "y")


@pytest.mark.parametrize("width", [96, 301, 1024])
def test_large_mean_does_not_cancel(device, width):
    check("cuda", device, 16, width, torch.float32, offset=300.0)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [96, 300, 1024, 16400])
def test_dropout_mask_bit_for_bit(device, width, dtype):
    """With inputs of ones the result is the dropout mask: the sum in the forward pass, the gradient of x in the
    backward pass."""
    p, rows = 0.5, 9
    rng = torch.randint(-(2**63), 2**63 - 1, (2,), device=device)
    x = torch.ones(rows, width, device=device, dtype=dtype)
    y, total, grad_v, grad_x = (memory.empty((rows, width), dtype, x.device) for _ in range(4))
    mean, rstd = (memory.empty((rows,), torch.float32, x.device) for _ in range(2))
    BACKEND.norm_forward(NormSpec(x, None, None, None, rng, 1e-5, False, p), y, total, mean, rstd)
    wanted = (keep_mask_2d(rng, p, rows, width) * keep_scale(p)).to(dtype)
    assert torch.equal(total, wanted)
    spec = NormSpec(total, None, None, None, rng, 1e-5, False, p)
    BACKEND.norm_backward(spec, torch.randn_like(x), None, mean, rstd, grad_v, grad_x, None, None)
    assert torch.equal(grad_x, grad_v * wanted)  # doubling is exact


def test_gradients_of_parameters_are_the_same_bits_every_time(device):
    tensors = (*(torch.randn(60, 80, device=device) for _ in range(2)), *(torch.randn(80, device=device),) * 2)
    tensors += tuple(torch.randn(60, 80, device=device) for _ in range(2))
    first = run(BACKEND, tensors, False, True, 0.0, None, torch.bfloat16)
    with contextlib.nullcontext() if device == "cuda" else cuda_emulator.active(seed=9):  # another order of warps
        again = run(BACKEND, tensors, False, True, 0.0, None, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_autograd_through_the_op(device):
    """float32 weights with bfloat16 rows and one seed give the values and gradients of plain PyTorch."""
    x, residual = (torch.randn(3, 5, 48, device=device, dtype=torch.bfloat16) for _ in range(2))
    weight, bias = (torch.randn(48, device=device) for _ in range(2))
    leaves = [x, residual, weight, bias]
    grad = torch.randn(3, 5, 48, device=device)

    def call(backend, dtype):
        inputs = [t.detach().to(dtype or t.dtype).requires_grad_() for t in leaves]
        torch.manual_seed(5)
        with tf.backend(backend):
            y, total = tf.add_layer_norm(*inputs, dropout_p=0.25)
            return [y, total, *torch.autograd.grad([y, total], inputs, [grad.to(y.dtype), grad.to(y.dtype)])]

    for i, (a, e, t) in enumerate(zip(call("cuda", None), call("eager", None), call("eager", torch.float64))):
        assert_as_accurate(a, t, e, OUTPUT if i < 2 else GRADIENT, NAMES[i])


@pytest.mark.quick
def test_only_the_gradients_that_are_wanted(device):
    x = torch.randn(6, 32, device=device, requires_grad=True)
    weight, bias = (torch.randn(32, device=device) for _ in range(2))
    with tf.backend("cuda"):
        (grad,) = torch.autograd.grad(tf.rms_norm(x, 32, weight, 1e-6).square().sum(), x)
    wanted = torch.autograd.grad(torch.nn.functional.rms_norm(x, (32,), weight, 1e-6).square().sum(), x)[0]
    torch.testing.assert_close(grad, wanted)
    bias.requires_grad_()
    with tf.backend("cuda"):
        (grad,) = torch.autograd.grad(tf.layer_norm(x.detach(), 32, weight, bias).square().sum(), bias)
    y = torch.nn.functional.layer_norm(x.detach(), (32,), weight, bias)
    torch.testing.assert_close(grad, torch.autograd.grad(y.square().sum(), bias)[0])


def test_weights_of_another_dtype_and_stride(device):
    x = torch.randn(6, 32, device=device, dtype=torch.bfloat16)
    weight, bias = torch.randn(32, 2, device=device)[:, 0], torch.randn(32, device=device).half()
    with tf.backend("cuda"):
        y = tf.layer_norm(x, 32, weight, bias)
    with tf.backend("eager"):
        truth = tf.layer_norm(x.double(), 32, weight.double(), bias.double())
        assert_as_accurate(y, truth, tf.layer_norm(x, 32, weight, bias), OUTPUT, "y")


@pytest.mark.quick
def test_without_rows(device):
    x = torch.randn(0, 32, device=device, requires_grad=True)
    weight = torch.randn(32, device=device, requires_grad=True)
    with tf.backend("cuda"):
        y = tf.layer_norm(x, 32, weight)
        grads = torch.autograd.grad(y.sum(), (x, weight))
    assert y.shape == grads[0].shape == (0, 32) and not grads[1].any()


def test_opcheck(device):
    x, residual = (torch.randn(4, 24, device=device, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(24, device=device, requires_grad=True) for _ in range(2))
    rng = torch.tensor([1, 2], device=device)
    with tf.backend("cuda"):
        args = (x, residual, weight, bias, rng, 1e-5, False, 0.25, True, True)
        torch.library.opcheck(torch.ops.transformer_fast.norm.default, args)


@pytest.mark.quick
def test_bad_input_is_refused_with_the_reason(device):
    x = torch.randn(4, 24, device=device)
    assert BACKEND.why_not(Call("norm", device, torch.float32, 24)) == ()
    with tf.backend("cuda"):
        with pytest.raises(RuntimeError, match="float64 is not float32, bfloat16 or float16"):
            tf.layer_norm(x.double(), 24)
        with pytest.raises(ValueError, match="weight"):
            tf.layer_norm(x, 24, torch.ones(23, device=device))
        with pytest.raises(ValueError, match="residual: wanted the shape"):
            tf.add_layer_norm(x, x[:3])


@pytest.mark.quick
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["layer_norm", "add_rms_norm", "dropped"])
def test_a_remembered_call_has_the_same_results(device, name, dtype, gradients):
    check_repeats(device, name, "cuda", dtype, gradients)
    assert remembered._calls
