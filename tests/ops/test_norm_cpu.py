"""The CPU kernels of the norms, compared with plain PyTorch on every instruction set of this processor."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import running_on
from numerics import GRADIENT, assert_as_accurate

import transformer_fast as tf
from transformer_fast.backends import native

if native.load():
    pytest.skip(native.load(), allow_module_level=True)

ISAS = native.supported_isas()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [1, 2, 7, 15, 16, 17, 31, 64, 100, 127, 128, 129, 200, 384, 768, 1000]


@pytest.fixture(params=ISAS)
def isa(request):
    with running_on(request.param) as isa:
        yield isa


def tensors(rows, width, dtype, weight_dtype, scale=1.0, shift=0.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, residual = (torch.randn(rows, width, generator=g) * scale + shift for _ in range(2))
    weight, bias = 1 + 0.2 * torch.randn(width, generator=g), torch.randn(width, generator=g)
    grads = [torch.randn(rows, width, generator=g) for _ in range(2)]
    return [x.to(dtype), residual.to(dtype), weight.to(weight_dtype), bias.to(weight_dtype)], [
        g.to(dtype) for g in grads
    ]


def run(backend, inputs, grads, *, rms, add, dropout_p, affine, return_sum, eps, dtype=None):
    """Outputs and gradients of one call. dtype: compute in this dtype instead."""
    x, residual, weight, bias = (t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs)
    weight, bias = (weight if affine else None), (bias if affine and not rms else None)
    torch.manual_seed(1)
    with tf.backend(backend):
        if add:
            args = (x, residual, weight) + (() if rms else (bias,)) + (eps,)
            function = tf.add_rms_norm if rms else tf.add_layer_norm
            out = function(*args, dropout_p=dropout_p, return_sum=return_sum)
            out = out if return_sum else (out,)
        elif rms:
            out = (tf.rms_norm(x, (x.shape[-1],), weight, eps),)
        else:
            out = (tf.layer_norm(x, (x.shape[-1],), weight, bias, eps),)
        leaves = [t for t in (x, residual if add else None, weight, bias) if t is not None]
        found = torch.autograd.grad(out, leaves, [g.to(o.dtype) for g, o in zip(grads, out)])
    return [o.detach() for o in out], found


def check(inputs, grads, **options):
    ours = run("cpu", inputs, grads, **options)
    eager = run("eager", inputs, grads, **options)
    truth = run("eager", inputs, grads, **options, dtype=torch.float64)
    for name, a, t, e in zip(("y", "sum"), ours[0], truth[0], eager[0]):
        assert_as_accurate(a, t, e, name=name)
    for i, (a, t, e) in enumerate(zip(ours[1], truth[1], eager[1])):
        assert_as_accurate(a, t, e, GRADIENT, name=f"gradient {i}")


options = st.fixed_dictionaries(
    {
        "rms": st.booleans(),
        "add": st.booleans(),
        "dropout_p": st.sampled_from([0.0, 0.1, 0.5]),
        "affine": st.booleans(),
        "return_sum": st.booleans(),
        "eps": st.sampled_from([1e-12, 1e-6, 1e-5]),
    }
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_backward(isa, dtype):
    @settings(max_examples=20, deadline=None, derandomize=True)
    @given(
        rows=st.sampled_from([1, 2, 3, 5, 33, 70]),
        width=st.sampled_from(WIDTHS),
        float_weight=st.booleans(),
        shift=st.sampled_from([0.0, 3.0]),
        options=options,
        seed=st.integers(0, 1000),
    )
    def property(rows, width, float_weight, shift, options, seed):
        if width <= 2 and not options["rms"]:
            options["eps"] = 0.1  # without a large eps y is always +-1, and the gradient cancels
        inputs, grads = tensors(rows, width, dtype, torch.float32 if float_weight else dtype, 1.0, shift, seed)
        check(inputs, grads, **options)

    property()


@pytest.mark.quick
@pytest.mark.parametrize("rms", [False, True])
def test_large_with_everything(rms):
    inputs, grads = tensors(300, 768, torch.float32, torch.float32)
    check(inputs, grads, rms=rms, add=True, dropout_p=0.1, affine=True, return_sum=True, eps=1e-5)


@pytest.mark.quick
@pytest.mark.parametrize("scale,shift", [(1e-3, 100.0), (1e4, 0.0), (1e-10, 0.0), (1.0, -1e4)])
def test_awkward_magnitudes(isa, scale, shift):
    inputs, grads = tensors(9, 70, torch.float32, torch.float32, scale, shift)
    check(inputs, grads, rms=False, add=False, dropout_p=0.0, affine=True, return_sum=False, eps=1e-5)


@pytest.mark.quick
@pytest.mark.parametrize("value", [0.0, 1.0, 3.3, -1e6])
@pytest.mark.parametrize("eps", [1e-12, 1e-5])
def test_constant_rows_give_the_bias(isa, value, eps):
    bias = torch.randn(100)
    y = tf.layer_norm(torch.full((3, 100), value), (100,), torch.rand(100), bias, eps)
    truth = bias.double().expand(3, 100)
    assert_as_accurate(y, truth, truth.float())


@pytest.mark.quick
def test_nan_and_infinity_stay_in_their_row(isa):
    x = torch.randn(6, 50)
    clean = tf.layer_norm(x, (50,))
    x[1, 3], x[4, 7] = float("nan"), float("inf")
    y = tf.layer_norm(x, (50,))
    assert y[[1, 4]].isnan().all()
    assert torch.equal(y[[0, 2, 3, 5]], clean[[0, 2, 3, 5]])


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs(isa, dtype):
    g = torch.Generator().manual_seed(0)
    wide = torch.randn(12, 3 * 40 + 5, generator=g).to(dtype)
    for x in (wide[:, 41:81], wide[::2, 3:43], wide.t()[:, :6], wide[:, ::3]):
        residual = torch.randn(x.shape[0], 2 * x.shape[1], generator=g).to(dtype)[:, : x.shape[1]]
        inputs = [x, residual, *tensors(1, x.shape[1], dtype, dtype)[0][2:]]
        grads = [torch.randn(x.shape[0], 2 * x.shape[1], generator=g).to(dtype)[:, 1 : x.shape[1] + 1] for _ in "ys"]
        check(inputs, grads, rms=False, add=True, dropout_p=0.0, affine=True, return_sum=True, eps=1e-5)


@pytest.mark.quick
@pytest.mark.parametrize("shape", [(0, 16), (3, 0, 16), (0, 1)])
def test_no_rows(shape):
    x, r = (torch.randn(shape, requires_grad=True) for _ in range(2))
    w = torch.ones(shape[-1], requires_grad=True)
    y, s = tf.add_layer_norm(x, r, w, dropout_p=0.1)
    assert y.shape == s.shape == shape
    y.sum().backward()
    assert x.grad.shape == shape and torch.equal(w.grad, torch.zeros(shape[-1]))


def test_long_columns_sum_accurately():
    inputs, grads = tensors(9000, 5, torch.float32, torch.float32, 1.0, 2.0)
    check(inputs, grads, rms=False, add=False, dropout_p=0.0, affine=True, return_sum=False, eps=1e-5)


@pytest.mark.quick
def test_same_bits_for_any_number_of_threads():
    inputs, grads = tensors(515, 192, torch.float32, torch.float32)
    features = {"rms": False, "add": True, "dropout_p": 0.2, "affine": True, "return_sum": True, "eps": 1e-5}
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(run("cpu", inputs, grads, **features))
    finally:
        torch.set_num_threads(before)
    for out, found in results[1:]:
        for a, b in zip((*out, *found), (*results[0][0], *results[0][1])):
            assert torch.equal(a, b)


@pytest.mark.quick
def test_dropout_of_add_norm_is_the_mask_of_eager(isa):
    inputs, _ = tensors(40, 300, torch.float32, torch.float32)
    sums = []
    for backend in ("cpu", "eager"):
        torch.manual_seed(3)
        with tf.backend(backend):
            sums.append(tf.add_layer_norm(inputs[0], torch.zeros(40, 300), dropout_p=0.3)[1])
    assert torch.equal(sums[0] == 0, sums[1] == 0)
    assert 0.25 < (sums[0] == 0).float().mean() < 0.35
