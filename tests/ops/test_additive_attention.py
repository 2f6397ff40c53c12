"""additive_attention: the definition is compared with the paper's formula, every kernel with the definition."""

import functools

import pytest
import torch
import triton_interpreter
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from instruction_sets import running_on
from numerics import GRADIENT, assert_as_accurate

import transformer_fast as tf
from transformer_fast.backends import native

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("context", "weights", "query", "key", "value", "score_weight", "bias")
ADDITIVE = tf.additive_attention


@pytest.fixture(scope="module", params=native.ISAS)
def kernels(request):
    """The C++ kernels of each instruction set."""
    with running_on(request.param):
        yield "cpu"


def case(batch=2, sq=3, sk=7, width=40, value_width=24, dtype=torch.float32, *, scale=1.0, weight_dtype=None, seed=0):
    """The tensors of a call, and cotangents of the context and of the weights."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(batch, sq, width), (batch, sk, width), (batch, sk, value_width), (width,), (width,)]
    tensors = [torch.randn(s, generator=g) * scale for s in shapes]
    tensors = [t.to(dtype) for t in tensors[:3]] + [t.to(weight_dtype or dtype) for t in tensors[3:]]
    cotangents = [torch.randn(batch, sq, n, generator=g) for n in (value_width, sk)]
    return tensors, cotangents


def run(backend, inputs, *, dtype=None, bias=True, **options):
    tensors, cotangents = inputs
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    if not bias:
        leaves.pop()
    with tf.backend(backend):
        results = ADDITIVE(*leaves, return_weights=True, **options)
        loss = sum((r * c.to(r.dtype)).sum() for r, c in zip(results, cotangents))
        return *(r.detach() for r in results), *torch.autograd.grad(loss, leaves)


def check(backend, inputs, **options):
    ours, eager = run(backend, inputs, **options), run("eager", inputs, **options)
    truth = run("eager", inputs, **options, dtype=torch.float64)
    compare(ours, eager, truth)
    return ours


def compare(*results):
    for i, (name, ours, eager, truth) in enumerate(zip(NAMES, *results)):
        assert_as_accurate(ours, truth, eager, *((GRADIENT,) if i > 1 else ()), name=name)


def check_draws(backend, draws, draw):
    """Compare `draws` calls as one, draw(seed) -> (inputs, options): the largest error of a result with few values,
    as the gradient of a narrow score_weight, depends on chance."""
    ours, eager, truth = [], [], []
    for seed in range(draws):
        inputs, options = draw(seed)
        ours.append(run(backend, inputs, **options))
        eager.append(run("eager", inputs, **options))
        truth.append(run("eager", inputs, **options, dtype=torch.float64))
    compare(*([torch.stack(parts) for parts in zip(*found)] for found in (ours, eager, truth)))


def formula(query, key, value, v, bias, alive):
    """The formula of appendix A.1.2, with the hidden layer in memory."""
    hidden = torch.tanh(query[:, :, None] + key[:, None] + bias)
    scores = (hidden * v).sum(-1).masked_fill(~alive, -torch.inf)
    weights = scores.softmax(-1)
    return torch.einsum("bij,bjd->bid", weights, value), weights


@pytest.mark.quick
@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_is_the_formula(backend):
    tensors, _ = case(dtype=torch.float64 if backend == "eager" else torch.float32)
    leaves = [t.requires_grad_() for t in tensors]
    lengths = torch.tensor([7, 4])
    alive = torch.arange(7) < lengths[:, None, None]
    wanted = formula(*leaves, alive)
    with tf.backend(backend):
        found = ADDITIVE(*leaves, key_lengths=lengths, return_weights=True)
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b)
    for a, b in zip(*(torch.autograd.grad(sum(r.square().sum() for r in rs), leaves) for rs in (found, wanted))):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=12, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(
    batch=st.sampled_from([1, 3]),
    sq=st.sampled_from([1, 2, 37, 70]),
    sk=st.sampled_from([1, 3, 16, 45]),
    width=st.sampled_from([1, 15, 64, 130]),
    value_width=st.sampled_from([1, 20, 33, 96]),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
    bias=st.booleans(),
    masked=st.booleans(),
    wide_weight=st.booleans(),
)
def test_drawn(kernels, dtype, masked, wide_weight, bias, batch, **shape):
    batch *= max(1, 600 // (shape["sq"] * shape["sk"]))

    def draw(seed):
        options = {"bias": bias}
        if masked:
            g = torch.Generator().manual_seed(seed)
            options["attn_mask"] = torch.rand(batch, shape["sq"], shape["sk"], generator=g) > 0.3
            options["key_lengths"] = torch.randint(0, shape["sk"] + 1, (batch,), generator=g)
        weight_dtype = torch.float32 if wide_weight else None
        return case(batch, dtype=dtype, weight_dtype=weight_dtype, seed=seed, **shape), options

    fewest = min(shape["width"], batch * shape["sq"] * shape["value_width"])
    check_draws(kernels, min(32, -(-256 // fewest)), draw)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=3, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(
    sq=st.sampled_from([1, 4, 17]),
    sk=st.sampled_from([1, 5, 18]),
    width=st.sampled_from([1, 20, 130]),
    value_width=st.sampled_from([1, 33, 70]),
    bias=st.booleans(),
    masked=st.booleans(),
)
def test_triton_drawn(dtype, sq, sk, masked, bias, **widths):
    batch = max(2, 40 // (sq * sk))

    def draw(seed):
        options = {"bias": bias}
        if masked:
            g = torch.Generator().manual_seed(seed)
            options["attn_mask"] = torch.rand(batch, 1, sk, generator=g) > 0.3
            options["key_lengths"] = torch.randint(0, sk + 1, (batch,), generator=g)
        return case(batch, sq, sk, dtype=dtype, seed=seed, **widths), options

    with triton_interpreter.active():
        check_draws("triton", 4, draw)


@pytest.mark.quick
def test_triton_walks_over_several_tiles():
    mask = torch.rand(2, 3, 70, generator=torch.Generator().manual_seed(1)) > 0.2
    with triton_interpreter.active():
        found = check("triton", case(2, 3, 70, 150, 70), attn_mask=mask, key_lengths=torch.tensor([70, 66]))
        context, weights, query, *_ = run("triton", case(), key_lengths=torch.tensor([0, 7]))
        values = case()[0]
        values[2][:, 4:] = float("nan")  # values past the lengths must not be read
        unread = run("triton", (values, case()[1]), key_lengths=torch.tensor([4, 2]))
    assert not found[0].isnan().any() and not any(t.isnan().any() for t in unread)
    assert context[0].eq(0).all() and weights[0].eq(0).all() and query[0].eq(0).all() and context[1].ne(0).all()


@pytest.mark.quick
@pytest.mark.parametrize("shape", [(1, 1, 7), (3, 1, 1), (1, 3, 7), (3, 3, 7)])
def test_masks_broadcast(kernels, shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.4
    inputs = case(3)
    for a, b in zip(
        run(kernels, inputs, attn_mask=mask), run(kernels, inputs, attn_mask=mask.expand(3, 3, 7).contiguous())
    ):
        assert torch.equal(a, b)
    check(kernels, case(3, 20, 7, 96, 96), attn_mask=mask if shape[1] == 1 else mask[:, :1])


@pytest.mark.quick
@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_nothing_to_attend_to_gives_zeros(backend):
    tensors, cotangents = case()
    mask = torch.ones(2, 3, 7, dtype=torch.bool)
    mask[1, 2] = False
    found = run(backend, (tensors, cotangents), attn_mask=mask, key_lengths=torch.tensor([0, 7]))
    context, weights, query, key, *_ = found
    assert context[0].eq(0).all() and context[1, 2].eq(0).all() and context[1, :2].ne(0).all()
    assert weights[0].eq(0).all() and weights[1, 2].eq(0).all()
    torch.testing.assert_close(weights[1, :2].sum(-1), torch.ones(2))
    assert query[0].eq(0).all() and query[1, 2].eq(0).all() and key[0].eq(0).all() and key[1].ne(0).all()
    assert all(not t.isnan().any() for t in found)


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_masked_positions_are_not_read(backend):
    """Values past key_lengths may be anything, even NaN."""
    tensors, cotangents = case()
    lengths = torch.tensor([7, 4])
    wanted = run(backend, (tensors, cotangents), key_lengths=lengths)
    if backend == "cpu":
        tensors[1][1, 4:] = tensors[2][1, 4:] = float("nan")
        for a, b in zip(run(backend, (tensors, cotangents), key_lengths=lengths), wanted):
            assert torch.equal(a, b)
    cut = [tensors[0][1:], tensors[1][1:, :4], tensors[2][1:, :4], *tensors[3:]]
    found = run(backend, (cut, [cotangents[0][1:], cotangents[1][1:, :, :4]]))
    torch.testing.assert_close(found[0], wanted[0][1:])
    torch.testing.assert_close(found[3], wanted[3][1:, :4])


@pytest.mark.parametrize("shape", [(0, 3, 7), (2, 0, 7), (2, 3, 0)])
@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_empty(backend, shape):
    context, weights, *grads = run(backend, case(*shape))
    assert context.shape == (*shape[:2], 24) and weights.shape == shape and context.eq(0).all()
    assert all(g.eq(0).all() for g in grads)


@pytest.mark.parametrize("width, value_width", [(0, 24), (40, 0)])
def test_no_width(width, value_width):
    context, weights, *grads = run("cpu", case(width=width, value_width=value_width))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3))
    assert context.shape == (2, 3, value_width)
    assert all(not g.isnan().any() for g in grads)


def test_strides():
    tensors, cotangents = case(3, 40, 21, 64, 64)
    wanted = run("cpu", (tensors, cotangents))
    query, key, value, *vectors = tensors
    wide = torch.stack([key, value], 2)  # adjacent projections
    for changed in (
        [query.transpose(1, 2).contiguous().transpose(1, 2), key, value],
        [query.transpose(0, 1).contiguous().transpose(0, 1), wide[:, :, 0], wide[:, :, 1]],
    ):
        for a, b in zip(run("cpu", ([*changed, *vectors], cotangents)), wanted):
            assert torch.equal(a, b)


def test_large_scores_and_saturated_units(kernels):
    check(kernels, case(8, 20, 30, 64, 64, scale=30.0))


def test_same_bits_on_any_number_of_threads():
    if native.load():
        pytest.skip(native.load())
    inputs, before, results = case(2, 65, 40, 100, 50), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run("cpu", inputs))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_the_hidden_layer_is_never_stored():
    """The hidden layer (B, Sq, Sk, D) would take 64 MB. Forward and backward together allocate less than a tenth."""
    if native.load():
        pytest.skip(native.load())
    inputs, _ = case(4, 64, 64, 1024, 64)
    leaves = [t.requires_grad_() for t in inputs]
    with torch.profiler.profile(profile_memory=True) as profile, tf.backend("cpu"):
        ADDITIVE(*leaves).sum().backward()
    allocated = sum(e.self_cpu_memory_usage for e in profile.events() if e.self_cpu_memory_usage > 0)
    assert 0 < allocated < 4 * 64 * 64 * 1024 * 4 / 10


# ---- torch's requirements for ops ------------------------------------------------------------------
def _function(query, key, value, v, bias):
    return ADDITIVE(query, key, value, v, bias, MASK, key_lengths=torch.tensor([7, 4]), return_weights=True)


MASK = torch.rand(2, 1, 7, generator=torch.Generator().manual_seed(2)) > 0.2


@pytest.mark.quick
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bias):
    tensors, _ = case()
    leaves = [t.requires_grad_() for t in tensors]
    arguments = (*leaves[:4], leaves[4] if bias else None, MASK.expand(2, 3, 7), torch.tensor([7, 4]))
    torch.library.opcheck(torch.ops.transformer_fast.additive_attention.default, arguments)


@pytest.mark.quick
def test_compiles_to_one_graph():
    tensors, cotangents = case()
    leaves = [t.requires_grad_() for t in tensors]
    results = []
    for function in (_function, torch.compile(_function, fullgraph=True, backend="aot_eager")):
        outputs = function(*leaves)
        loss = sum((o * c).sum() for o, c in zip(outputs, cotangents))
        results.append([*outputs, *torch.autograd.grad(loss, leaves)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


def test_gradients_by_finite_differences():
    tensors, _ = case(dtype=torch.float64)
    with tf.backend("eager"):
        torch.autograd.gradcheck(_function, [t.requires_grad_() for t in tensors], fast_mode=True)


@pytest.mark.parametrize("which", [0, 1])
def test_gradient_of_one_output_alone(which):
    """An unused output has no gradient, instead of a gradient of zeros."""
    tensors, cotangents = case()
    found = {}
    for backend in ("cpu", "eager"):
        leaves = [t.detach().requires_grad_() for t in tensors]
        with tf.backend(backend):
            outputs = ADDITIVE(*leaves, return_weights=True)
            loss = (outputs[which] * cotangents[which]).sum()
            found[backend] = torch.autograd.grad(loss, leaves, allow_unused=True)
    for a, b in zip(found["cpu"], found["eager"]):
        torch.testing.assert_close(torch.zeros_like(b) if a is None else a, b)


def test_gradients_of_gradients():
    tensors, cotangents = case()
    found = []
    alive = MASK & (torch.arange(7) < torch.tensor([7, 4])[:, None, None])
    plain = functools.partial(formula, alive=alive)
    for function, dtype in ((_function, torch.float32), (plain, torch.float64), (plain, torch.float32)):
        leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
        loss = sum((o * c.to(dtype)).sum() for o, c in zip(function(*leaves), cotangents))
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    for ours, truth, theirs in zip(*found):
        assert_as_accurate(ours, truth, theirs, GRADIENT)


def test_forward_mode():
    tensors, _ = case()
    tangents = [torch.randn(t.shape, generator=torch.Generator().manual_seed(i)) for i, t in enumerate(tensors)]
    alive = MASK & (torch.arange(7) < torch.tensor([7, 4])[:, None, None])
    ours = torch.func.jvp(_function, tuple(tensors), tuple(tangents))[1]
    theirs, truth = (
        torch.func.jvp(
            lambda *t: formula(*t, alive), tuple(t.to(dtype) for t in tensors), tuple(t.to(dtype) for t in tangents)
        )[1]
        for dtype in (torch.float32, torch.float64)
    )
    for results in zip(ours, truth, theirs):
        assert_as_accurate(*results, GRADIENT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    tensors, _ = case()
    leaves = [t.requires_grad_() for t in tensors]
    with torch.autocast("cpu", dtype=dtype):
        context, weights = ADDITIVE(*leaves, return_weights=True)
    assert context.dtype == weights.dtype == dtype
    context.float().square().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in leaves)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context):
    tensors, _ = case()
    wanted = _function(*(t.requires_grad_() for t in tensors))
    with context():
        found = _function(*tensors)
    for a, b in zip(found, wanted):
        assert not a.requires_grad and torch.equal(a, b)


Q, K, V, W = torch.randn(2, 3, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 6), torch.randn(8)
BAD = {
    "not a tensor": (lambda: ADDITIVE([1.0], K, V, W), TypeError, "query.*list"),
    "rank": (lambda: ADDITIVE(Q[0], K, V, W), ValueError, r"query.*3 dimensions.*\(3, 8\)"),
    "integers": (lambda: ADDITIVE(Q, K.long(), V, W), TypeError, "key.*int64"),
    "dtype": (lambda: ADDITIVE(Q, K, V.half(), W), TypeError, "value.*float16.*query.*float32"),
    "device": (lambda: ADDITIVE(Q, K.to("meta"), V, W), ValueError, "key.*meta.*cpu"),
    "batch": (lambda: ADDITIVE(Q, K[:1], V, W), ValueError, "key.*batch 2.*1"),
    "width": (lambda: ADDITIVE(Q, K[..., :5], V, W), ValueError, "key.*width 8.*5"),
    "positions": (lambda: ADDITIVE(Q, K, V[:, :4], W), ValueError, "value.*5 positions.*4"),
    "no score": (lambda: ADDITIVE(Q, K, V, None), TypeError, "score_weight.*NoneType"),
    "score shape": (lambda: ADDITIVE(Q, K, V, W[:3]), ValueError, r"score_weight.*\(8,\).*\(3,\)"),
    "score dtype": (lambda: ADDITIVE(Q, K, V, W.half()), TypeError, "score_weight.*float16.*float32"),
    "bias shape": (lambda: ADDITIVE(Q, K, V, W, Q), ValueError, r"bias.*\(8,\)"),
    "mask dtype": (lambda: ADDITIVE(Q, K, V, W, None, torch.ones(2, 3, 5)), TypeError, "attn_mask.*bool.*float32"),
    "mask shape": (
        lambda: ADDITIVE(Q, K, V, W, None, torch.ones(2, 4, 5, dtype=torch.bool)), ValueError,
        r"attn_mask.*\(2, 3, 5\).*\(2, 4, 5\)",
    ),
    "lengths dtype": (lambda: ADDITIVE(Q, K, V, W, key_lengths=W[:2]), TypeError, "key_lengths.*float32"),
    "lengths shape": (lambda: ADDITIVE(Q, K, V, W, key_lengths=torch.tensor([5])), ValueError, r"key_lengths.*\(2,\)"),
    "lengths range": (
        lambda: ADDITIVE(Q, K, V, W, key_lengths=torch.tensor([5, 6])), ValueError, r"key_lengths.*\[0, 5\].*6",
    ),
}  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()
