"""embedding_layer_norm: the definition is compared with torch, every kernel with the definition."""

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
NAMES = ("word", "position", "token_type", "norm_weight", "norm_bias")


@pytest.fixture(scope="module", params=[*native.ISAS, "triton"])
def kernels(request):
    """A backend whose kernels are all tested: C++ for each instruction set, Triton under its interpreter."""
    if request.param == "triton":
        with triton_interpreter.active():
            yield "triton"
        return
    with running_on(request.param):
        yield "cpu"


def case(shape, width, dtype, *, entries=(37, 11, 2), weight_dtype=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = [torch.randint(n, shape, generator=g) for n in entries]
    tables = [torch.randn(n, width, generator=g).to(dtype) for n in entries]
    norm = [1 + 0.2 * torch.randn(width, generator=g), torch.randn(width, generator=g)]
    return ids, [*tables, *(t.to(weight_dtype or dtype) for t in norm)], torch.randn(*shape, width, generator=g)


def run(backend, inputs, *, position=True, token_type=True, affine=True, dtype=None, **options):
    ids, tensors, grad = inputs
    word, pos, typ, weight, bias = (t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors)
    torch.manual_seed(1)
    with tf.backend(backend):
        y = tf.embedding_layer_norm(
            ids[0], word, *((ids[1], pos) if position else (None, None)),
            *((ids[2], typ) if token_type else (None, None)), *((weight, bias) if affine else ()), **options,
        )  # fmt: skip
        leaves = [word, *([pos] if position else []), *([typ] if token_type else []), *([weight, bias] * affine)]
        return y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))


def check(backend, inputs, **options):
    ours, eager = run(backend, inputs, **options), run("eager", inputs, **options)
    truth = run("eager", inputs, **options, dtype=torch.float64)
    assert_as_accurate(ours[0], truth[0], eager[0], name="y")
    if ours[0].shape[-1] < 8:  # the norm of so few elements is almost constant, so gradients are rounding noise
        return ours
    for i, (a, t, e) in enumerate(zip(ours[1:], truth[1:], eager[1:])):
        assert_as_accurate(a, t, e, GRADIENT, name=f"gradient {i}")
    return ours


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(
    shape=st.sampled_from([(1,), (7,), (2, 5), (3, 1), (2, 2, 3), (70,)]),
    width=st.sampled_from([1, 2, 15, 16, 33, 128, 257, 384, 768]),
    dropout_p=st.sampled_from([0.0, 0.1, 0.6]),
    padding_idx=st.sampled_from([None, 0, -1]),
    position=st.booleans(),
    token_type=st.booleans(),
    affine=st.booleans(),
    wide_norm=st.booleans(),
)
def test_drawn(kernels, dtype, shape, width, wide_norm, **options):
    check(kernels, case(shape, width, dtype, weight_dtype=torch.float32 if wide_norm else None), **options)


@pytest.mark.quick
def test_bert_input(kernels):
    """Many rows per table entry: long sums in the gradients of positions and segments."""
    check(kernels, case((8, 40), 64, torch.float32, entries=(100, 40, 2)), dropout_p=0.1, padding_idx=0)


@pytest.mark.quick
@pytest.mark.parametrize("backend", ["eager", None])
def test_is_torchs(backend):
    ids, tensors, grad = case((3, 8), 24, torch.float32)
    positions = torch.arange(8)[None]
    word, pos, typ, weight, bias = leaves = [t.requires_grad_() for t in tensors]
    total = F.embedding(ids[0], word, 5) + F.embedding(positions, pos) + F.embedding(ids[2], typ)
    wanted = F.layer_norm(total, (24,), weight, bias, 1e-12)
    with tf.backend(backend or "cpu"):
        y = tf.embedding_layer_norm(ids[0].int(), word, positions, pos, ids[2], typ, weight, bias, 1e-12, padding_idx=5)
        found = torch.autograd.grad(y, leaves, grad)
    torch.testing.assert_close(y, wanted)
    for name, a, b in zip(NAMES, found, torch.autograd.grad(wanted, leaves, grad)):
        torch.testing.assert_close(a, b, msg=name)


def test_padding_row_has_no_gradient(kernels):
    ids, tensors, grad = case((50,), 20, torch.float32, entries=(5, 11, 2))
    found = run(kernels, (ids, tensors, grad), padding_idx=3)
    assert found[1][3].eq(0).all() and found[1][[0, 1, 2, 4]].ne(0).any(1).all()


def test_drops_what_eager_drops(kernels):
    inputs = case((9,), 300, torch.float32)
    ours, eager = (run(b, inputs, dropout_p=0.4)[0] for b in (kernels, "eager"))
    assert torch.equal(ours == 0, eager == 0) and 0.3 < (ours == 0).float().mean() < 0.5


def test_tables_with_strided_rows(kernels):
    ids, tensors, grad = case((6,), 48, torch.float32)
    wide = torch.cat([tensors[0], tensors[0]], 1)
    check(kernels, (ids, [wide[:, :48], *tensors[1:]], grad))
    check(kernels, (ids, [tensors[0].t().contiguous().t(), *tensors[1:]], grad))
    strided = torch.randint(11, (12,))[::2]
    check(kernels, ([strided, strided, ids[2]], tensors, grad))


def test_no_ids(kernels):
    ids, tensors, grad = case((0, 4), 16, torch.float32)
    y, *grads = run(kernels, (ids, tensors, grad))
    assert y.shape == (0, 4, 16)
    assert all(g.eq(0).all() for g in grads)


def test_only_wanted_gradients():
    ids, tensors, grad = case((6,), 16, torch.float32)
    full = run("cpu" if not native.load() else "eager", (ids, tensors, grad))
    for i in range(5):
        leaves = [t.clone().requires_grad_(k == i) for k, t in enumerate(tensors)]
        y = tf.embedding_layer_norm(ids[0], leaves[0], ids[1], leaves[1], ids[2], leaves[2], leaves[3], leaves[4])
        y.backward(grad)
        torch.testing.assert_close(leaves[i].grad, full[1 + i])


def test_same_bits_on_any_number_of_threads():
    if native.load():
        pytest.skip(native.load())
    inputs = case((300,), 96, torch.float32, entries=(20, 11, 2))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run("cpu", inputs, dropout_p=0.1))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
