"""The Triton norm kernels against float64: on a GPU if there is one, else under Triton's interpreter."""

import contextlib

import pytest
import torch
import triton_interpreter
from hypothesis import given, settings
from hypothesis import strategies as st
from norm_cases import NAMES, check, run
from numerics import GRADIENT, OUTPUT, assert_as_accurate
from remembered_cases import check_repeats

import transformer_fast as tf
from transformer_fast.backends import Call, memory
from transformer_fast.backends.philox import keep_mask_2d, keep_scale
from transformer_fast.backends.triton import BACKEND

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _on_the_device(device):
    with contextlib.nullcontext() if device == "cuda" else triton_interpreter.active():
        yield


@pytest.fixture
def small_blocks(monkeypatch):
    """Use the code for rows beyond the register limit from 128 columns on, a size that the interpreter can run."""
    from transformer_fast.kernels import norm as kernels

    monkeypatch.setattr(kernels, "FORWARD_WIDTH", 128)
    monkeypatch.setattr(kernels, "BACKWARD_WIDTH", 128)
    monkeypatch.setattr(kernels, "WIDE_FORWARD", kernels.Config(1, 128, 4))
    monkeypatch.setattr(kernels, "WIDE_BACKWARD", kernels.Config(2, 128, 4, programs=2))


def _check(*args, **options):
    check("triton", *args, **options)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("add, p", [(False, 0.0), (True, 0.0), (True, 0.3), (False, 0.5)])
def test_features(device, dtype, rms, add, p):
    _check(device, 7, 96, dtype, rms=rms, add=add, p=p)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def _drawn(device, data):
    _check(
        device,
        data.draw(st.integers(1, 70), label="rows"),
        data.draw(st.integers(1, 300), label="width"),
        data.draw(st.sampled_from(DTYPES), label="dtype"),
        rms=data.draw(st.booleans(), label="rms"),
        add=data.draw(st.booleans(), label="add"),
        p=data.draw(st.sampled_from([0.0, 0.0, 0.1, 0.9]), label="p"),
        affine=data.draw(st.tuples(st.booleans(), st.booleans()), label="affine"),
        stride=data.draw(st.sampled_from([0, 1, 16]), label="stride"),
    )


def test_drawn_shapes(device):
    _drawn(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, width", [(1, 1), (3, 129), (5, 1024)])
def test_named_shapes(device, dtype, rows, width):
    _check(device, rows, width, dtype, add=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("width, p", [(129, 0.0), (384, 0.2), (500, 0.0)])
def test_rows_wider_than_a_block(device, small_blocks, dtype, rms, width, p):
    _check(device, 5, width, dtype, rms=rms, add=True, p=p)


@pytest.mark.parametrize("width", [96, 300])
def test_large_mean_does_not_cancel(device, small_blocks, width):
    _check(device, 16, width, torch.float32, offset=300.0)


@pytest.mark.quick
@pytest.mark.parametrize("width", [96, 300])
def test_dropout_mask_bit_for_bit(device, width, small_blocks):
    """With inputs of ones the result is the dropout mask: the sum in the forward pass, the gradient of x in the
    backward pass."""
    from transformer_fast.backends.specs import NormSpec

    p, rows = 0.4, 9
    rng = torch.randint(-(2**63), 2**63 - 1, (2,), device=device)
    x = torch.ones(rows, width, device=device)
    y, total, grad_v, grad_x = (memory.empty((rows, width), torch.float32, x.device) for _ in range(4))
    mean, rstd = (memory.empty((rows,), torch.float32, x.device) for _ in range(2))
    BACKEND.norm_forward(NormSpec(x, None, None, None, rng, 1e-5, False, p), y, total, mean, rstd)
    wanted = keep_mask_2d(rng, p, rows, width) * keep_scale(p)
    assert torch.equal(total, wanted.float())
    spec = NormSpec(total, None, None, None, rng, 1e-5, False, p)
    BACKEND.norm_backward(spec, torch.randn_like(x), None, mean, rstd, grad_v, grad_x, None, None)
    assert torch.equal(grad_x, grad_v * wanted.float())


def test_gradients_of_parameters_are_the_same_bits_every_time(device):
    tensors = (*(torch.randn(60, 80, device=device) for _ in range(2)), *(torch.randn(80, device=device),) * 2)
    tensors += tuple(torch.randn(60, 80, device=device) for _ in range(2))
    first = run(BACKEND, tensors, False, True, 0.0, None, torch.bfloat16)
    again = run(BACKEND, tensors, False, True, 0.0, None, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(first, again))


def _call(x, residual, weight, bias):
    return tf.add_layer_norm(x, residual, weight, bias, dropout_p=0.25)


def test_autograd_through_the_op(device):
    """float32 weights with bfloat16 rows and one seed give the values and gradients of plain PyTorch."""
    x, residual = (torch.randn(3, 5, 48, device=device, dtype=torch.bfloat16) for _ in range(2))
    weight, bias = (torch.randn(48, device=device) for _ in range(2))
    leaves = [x, residual, weight, bias]
    grad = torch.randn(3, 5, 48, device=device)

    def run(backend, dtype):
        inputs = [t.detach().to(dtype or t.dtype).requires_grad_() for t in leaves]
        torch.manual_seed(5)
        with tf.backend(backend):
            y, total = _call(*inputs)
            return [y, total, *torch.autograd.grad([y, total], inputs, [grad.to(y.dtype), grad.to(y.dtype)])]

    for i, (a, e, t) in enumerate(zip(run("triton", None), run("eager", None), run("eager", torch.float64))):
        assert_as_accurate(a, t, e, OUTPUT if i < 2 else GRADIENT, NAMES[i])


@pytest.mark.quick
def test_only_the_gradients_that_are_wanted(device):
    x = torch.randn(6, 32, device=device, requires_grad=True)
    weight = torch.randn(32, device=device)
    with tf.backend("triton"):
        (grad,) = torch.autograd.grad(tf.rms_norm(x, 32, weight, 1e-6).square().sum(), x)
    wanted = torch.autograd.grad(torch.nn.functional.rms_norm(x, (32,), weight, 1e-6).square().sum(), x)[0]
    torch.testing.assert_close(grad, wanted)


def test_opcheck(device):
    x, residual = (torch.randn(4, 24, device=device, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(24, device=device, requires_grad=True) for _ in range(2))
    rng = torch.tensor([1, 2], device=device)
    with tf.backend("triton"):
        args = (x, residual, weight, bias, rng, 1e-5, False, 0.25, True, True)
        torch.library.opcheck(torch.ops.transformer_fast.norm.default, args)


@pytest.mark.quick
def test_why_not_names_each_reason(monkeypatch, device):
    import os

    from transformer_fast.backends import triton as module

    call = Call("norm", device, torch.float32, 768)
    assert BACKEND.why_not(call) == ()
    assert "float64 is not" in BACKEND.why_not(call._replace(dtype=torch.float64))[0]
    assert "no Triton kernel for sorting" in BACKEND.why_not(call._replace(op="sorting"))[0]
    assert "device xpu is not cuda" in BACKEND.why_not(call._replace(device="xpu"))[0]
    monkeypatch.setattr(module, "_missing", lambda: "Triton is not installed")
    assert "not installed" in BACKEND.why_not(call)[0]
    assert torch.cuda.is_available() or BACKEND.status() == "idle: no NVIDIA GPU is visible"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "not installed" in BACKEND.status()
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert "7.5, below 8.0" in BACKEND.why_not(call._replace(device="cuda"))[0]
    assert "7.5, below 8.0" in BACKEND.status()
    monkeypatch.delitem(os.environ, "TRITON_INTERPRET", raising=False)
    reasons = BACKEND.why_not(Call("sorting", "cpu", torch.float64, 1))
    assert len(reasons) == 3 and "TRITON_INTERPRET=1" in reasons[0]
    with tf.backend("triton"), pytest.raises(RuntimeError, match="float64.*is not"):
        tf.layer_norm(torch.randn(2, 8, dtype=torch.float64, device=device), 8)


def test_info_says_what_no_gpu_has_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    from transformer_fast.backends.triton import BACKEND, verified_on_gpu

    assert verified_on_gpu() <= BACKEND.ops()
    unverified = ", ".join(sorted(BACKEND.ops() - verified_on_gpu()))
    assert not unverified or f"not yet run on a GPU: {unverified}" in BACKEND.status()


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", ["layer_norm", "add_rms_norm", "dropped"])
def test_a_remembered_call_has_the_same_results(device, name, gradients):
    """On a GPU. Under the interpreter no launch is repeated."""
    check_repeats(device, name, "triton", torch.bfloat16, gradients)
