"""cross_entropy and linear_cross_entropy: the definition is compared with torch, every kernel with the definition."""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
import triton_interpreter
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from instruction_sets import running_on
from numerics import GRADIENT, assert_as_accurate

import transformer_fast as tf
from transformer_fast.backends import native

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module", params=[*native.ISAS, "triton"])
def kernels(request):
    """A backend whose kernels are all tested: C++ for each instruction set, Triton under its interpreter."""
    if request.param == "triton":
        with triton_interpreter.active():
            yield "triton"
        return
    with running_on(request.param):
        yield "cpu"


def case(rows, classes, dtype, *, scale=2.0, ignored=0.3, weighted=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, classes, generator=g) * scale).to(dtype)
    target = torch.randint(classes, (rows,), generator=g)
    target[torch.rand(rows, generator=g) < ignored] = -100
    weight = torch.rand(classes, generator=g) + 0.1 if weighted else None
    return logits, target, weight, torch.randn(rows, generator=g)


def run(backend, inputs, options, dtype=None):
    """Losses and the gradient of the logits."""
    logits, target, weight, grad = inputs
    logits = logits.detach().to(dtype or logits.dtype).requires_grad_()
    with tf.backend(backend) if backend else contextlib.nullcontext():
        losses = tf.cross_entropy(logits, target, weight, reduction="none", **options)
        (found,) = torch.autograd.grad(losses, logits, grad.to(losses.dtype))
    return losses.detach(), found


def check(backend, inputs, **options):
    ours, eager = run(backend, inputs, options), run("eager", inputs, options)
    truth = run("eager", inputs, options, torch.float64)
    assert_as_accurate(ours[0], truth[0], eager[0], name="loss")
    assert_as_accurate(ours[1], truth[1], eager[1], GRADIENT, name="gradient")
    ignored = inputs[1] == -100
    assert ours[0][ignored].eq(0).all() and ours[1][ignored].eq(0).all()


OPTIONS = st.fixed_dictionaries(
    {"label_smoothing": st.sampled_from([0.0, 0.1, 1.0]), "z_loss": st.sampled_from([0.0, 1e-4, 0.3])}
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=10, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(
    rows=st.integers(1, 9),
    classes=st.sampled_from([1, 2, 3, 15, 16, 17, 63, 64, 65, 300, 1000, 4096, 4097, 9001]),
    weighted=st.booleans(),
    options=OPTIONS,
    seed=st.integers(0, 9),
)
def test_drawn(kernels, dtype, rows, classes, weighted, options, seed):
    check(kernels, case(rows, classes, dtype, weighted=weighted, seed=seed), **options)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_vocabulary(kernels, dtype):
    check(kernels, case(3, 30522, dtype, ignored=0.0), label_smoothing=0.1, z_loss=1e-4)


@pytest.mark.parametrize("offset", [1e4, -3e4])
def test_large_logits(kernels, offset):
    """With one rounded logsumexp the probabilities would lose their precision."""
    logits, *rest = case(5, 5000, torch.float32)
    check(kernels, (logits + offset, *rest), label_smoothing=0.1)
    logits[:, 4500] = 5e4  # one huge logit
    check(kernels, (logits, *rest))


def test_minus_infinity(kernels):
    """Logits of -inf (banned tokens), including whole blocks."""
    logits, target, weight, grad = case(6, 9000, torch.float32, ignored=0.0)
    logits[:, 4000:8500] = -math.inf
    target[:3], target[3:] = 8600, 5
    inputs = (logits, target, weight, grad)
    check(kernels, inputs)
    losses, gradient = run(kernels, inputs, {})
    assert losses.isfinite().all() and gradient[:, 4000:8500].eq(0).all()
    target[0] = 4000
    losses, _ = run(kernels, inputs, {})
    assert losses[0] == math.inf and losses[1:].isfinite().all()
    logits[:] = -math.inf
    assert run(kernels, inputs, {})[0].isnan().all()


def test_nan_stays(kernels):
    logits, target, weight, grad = case(4, 5000, torch.float32, ignored=0.0)
    logits[1, 17] = math.nan
    losses, gradient = run(kernels, (logits, target, weight, grad), {})
    assert losses.isnan().tolist() == [False, True, False, False]
    assert gradient[1].isnan().all() and gradient[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_rows(kernels, dtype):
    padded, target, weight, grad = case(7, 5056, dtype)
    target[0] = 0
    check(kernels, (padded[:, :5001], target.clamp(max=5000), weight, grad))
    every_other, target, weight, grad = case(14, 100, dtype)
    check(kernels, (every_other[::2], target[::2], weight, grad[::2]))
    check(kernels, (case(40, 6, dtype)[0].t(), case(6, 40, dtype)[1], None, grad[:6]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inplace_gradient(kernels, dtype):
    logits, target, _, _ = case(5, 5001, dtype)
    expected = logits.clone().requires_grad_()
    leaf = logits.clone().requires_grad_()
    with tf.backend(kernels):
        tf.cross_entropy(expected, target, label_smoothing=0.1).backward()
        scores = leaf * 1
        kept = scores.detach()
        tf.cross_entropy(scores, target, label_smoothing=0.1, inplace_gradient=True).backward()
        assert torch.equal(leaf.grad, expected.grad) and torch.equal(kept, expected.grad)
        scores = leaf * 1
        loss = tf.cross_entropy(scores, target, inplace_gradient=True)
        other = scores.square().sum()  # needs the logits
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (loss.backward(), other.backward())


@pytest.mark.quick
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("backend", ["eager", None])
def test_is_torchs(backend, reduction, smoothing, weighted):
    logits, target, weight, _ = case(9, 50, torch.float32, weighted=weighted)
    arguments = {"weight": weight, "reduction": reduction, "label_smoothing": smoothing}
    results = []
    for function in (tf, F):
        x = logits.clone().requires_grad_()
        with tf.backend(backend) if backend else contextlib.nullcontext():
            loss = function.cross_entropy(x, target, **arguments)
            results.append((loss, *torch.autograd.grad(loss.sum() * 1.7, x)))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)
    one = tf.cross_entropy(logits[0], target[0].clamp(min=0), **arguments)
    torch.testing.assert_close(one, F.cross_entropy(logits[0], target[0].clamp(min=0), **arguments))


def test_nothing_counted(kernels):
    x = torch.randn(3, 7, requires_grad=True)
    target = torch.full((3,), 2)
    with tf.backend(kernels):
        loss = tf.cross_entropy(x, target, ignore_index=2)
        loss.backward()
        assert loss.isnan() and x.grad.eq(0).all()
        assert tf.cross_entropy(x, target, ignore_index=2, reduction="sum") == 0
        empty = torch.randn(0, 7, requires_grad=True)
        assert tf.cross_entropy(empty, target[:0]).isnan()
        tf.cross_entropy(empty, target[:0], reduction="sum").backward()
        assert empty.grad.shape == (0, 7)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_class_has_a_gradient_of_exactly_zero(kernels, smoothing):
    """With one class the probability is exactly 1, so the gradient must have no rounding error."""
    torch.manual_seed(0)
    logits = torch.randn(40, 1, requires_grad=True)
    with tf.backend(kernels):
        losses = tf.cross_entropy(logits, torch.zeros(40).long(), torch.rand(1) + 0.1, reduction="none",
                                  label_smoothing=smoothing)  # fmt: skip
    assert not torch.autograd.grad(losses, logits, torch.randn(40))[0].any()


def test_ignore_index_may_be_a_class(kernels):
    logits, target, _, grad = case(8, 20, torch.float32, ignored=0.0)
    target[:3] = 4
    with tf.backend(kernels):
        losses = tf.cross_entropy(logits, target, ignore_index=4, reduction="none")
    torch.testing.assert_close(losses, F.cross_entropy(logits, target, ignore_index=4, reduction="none"))


def test_same_bits_on_any_number_of_threads():
    if native.load():
        pytest.skip(native.load())
    inputs = case(33, 9001, torch.float32, weighted=True)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run("cpu", inputs, {"label_smoothing": 0.1}))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


# ---- linear_cross_entropy --------------------------------------------------------------------------
def linear_case(rows, width, classes, dtype, *, biased=True, ignored=0.3, seed=0):
    g = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(rows, width, generator=g), torch.randn(classes, width, generator=g) * width**-0.5]
    if biased:
        tensors.append(torch.randn(classes, generator=g))
    target = torch.randint(classes, (rows,), generator=g)
    target[torch.rand(rows, generator=g) < ignored] = -100
    target[0] = 0
    return [t.to(dtype) for t in tensors], target


def run_linear(backend, tensors, target, options, *, fused, dtype=None, chunk_rows=None, factor=1.0):
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    hidden, weight, bias = (*leaves, None)[:3]
    with tf.backend(backend):
        if fused:
            loss = tf.linear_cross_entropy(hidden, weight, target, bias, chunk_rows, **options)
        else:
            loss = tf.cross_entropy(F.linear(hidden, weight, bias), target, **options)
        return loss.detach(), *torch.autograd.grad(loss * factor, leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=6, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(
    rows=st.integers(12, 24),
    width=st.sampled_from([8, 17, 33]),
    classes=st.sampled_from([2, 17, 300]),
    biased=st.booleans(),
    chunk_rows=st.sampled_from([None, 1, 3, 7, 64]),
    reduction=st.sampled_from(["mean", "sum"]),
    ignored=st.sampled_from([0.0, 0.5]),
    options=OPTIONS,
)
def test_linear_drawn(kernels, dtype, rows, width, classes, biased, chunk_rows, reduction, ignored, options):
    tensors, target = linear_case(rows, width, classes, dtype, biased=biased, ignored=ignored)
    options = {**options, "reduction": reduction}
    ours = run_linear(kernels, tensors, target, options, fused=True, chunk_rows=chunk_rows)
    eager = run_linear("eager", tensors, target, options, fused=False)
    truth = run_linear("eager", tensors, target, options, fused=False, dtype=torch.float64)
    for name, a, t, e in zip(("hidden", "weight", "bias"), ours[1:], truth[1:], eager[1:]):
        assert a.dtype == dtype
        assert_as_accurate(a, t, e, GRADIENT, name=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_linear_losses(kernels, dtype, reduction):
    cases = [linear_case(9, 16, 700, dtype, seed=seed) for seed in range(8)]

    def losses(backend, fused, dtype=None):
        options = {"reduction": reduction, "label_smoothing": 0.1, "z_loss": 1e-3}
        return torch.stack([run_linear(backend, *c, options, fused=fused, dtype=dtype, chunk_rows=4)[0] for c in cases])

    assert_as_accurate(losses(kernels, True), losses("eager", False, torch.float64), losses("eager", False))


def test_linear_half_precision_shares_do_not_underflow():
    """The gradient of one row of a mean over many rows underflows in float16, but not with a loss scale."""
    tensors, target = linear_case(3000, 4, 5, torch.float16, ignored=0.0)
    ours = run_linear("eager", tensors, target, {}, fused=True, factor=65536.0)
    truth = run_linear("eager", tensors, target, {}, fused=False, factor=65536.0, dtype=torch.float64)
    assert_as_accurate(ours[1], truth[1], truth[1].half(), GRADIENT)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 2), (1, 2), (0, 1, 2)])
def test_linear_computes_only_wanted_gradients(frozen):
    tensors, target = linear_case(11, 6, 40, torch.float32)
    results = []
    for function in (
        lambda h, w, b: tf.linear_cross_entropy(h, w, target, b, 4),
        lambda h, w, b: F.cross_entropy(F.linear(h, w, b), target),
    ):
        leaves = [t.clone().requires_grad_(i not in frozen) for i, t in enumerate(tensors)]
        loss = function(*leaves)
        if loss.requires_grad:
            (2.5 * loss).backward()
        results.append([loss, *(t.grad for t in leaves)])
    for a, b in zip(*results):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def test_linear_in_two_dimensions_under_autocast():
    tensors, target = linear_case(12, 6, 40, torch.float32)
    hidden, weight, bias = (t.requires_grad_() for t in tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = tf.linear_cross_entropy(hidden.view(3, 4, 6), weight, target.view(3, 4), bias)
        wanted = F.cross_entropy(F.linear(hidden, weight, bias).float(), target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    assert weight.grad.dtype == torch.float32 and hidden.grad.shape == (12, 6)


def test_linear_backward_twice():
    tensors, target = linear_case(12, 6, 40, torch.float32)
    leaves = [t.requires_grad_() for t in tensors]
    loss = tf.linear_cross_entropy(leaves[0], leaves[1], target, leaves[2])
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(3 * loss, leaves)
    for a, b in zip(first, second):
        torch.testing.assert_close(3 * a, b)


def test_linear_nothing_counted():
    tensors, _ = linear_case(5, 6, 40, torch.float32)
    leaves = [t.requires_grad_() for t in tensors]
    loss = tf.linear_cross_entropy(leaves[0], leaves[1], torch.full((5,), -100), leaves[2])
    assert loss.isnan()
    for grad in torch.autograd.grad(loss, leaves):
        assert grad.eq(0).all()
