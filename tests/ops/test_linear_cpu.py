"""linear and projections: the fastest GEMM, several weights of one input, and the fallback to torch's own."""

import types

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import GRADIENT, assert_as_accurate

import transformer_fast as tf
from transformer_fast.backends import eager, gemm, native

if native.load():
    pytest.skip(native.load(), allow_module_level=True)

ACTIVATIONS = [None, "gelu", "gelu_tanh", "relu", "silu"]


@pytest.fixture(params=["onednn", "blas"])
def route(request, monkeypatch):
    """Run with torch's own GEMM, and with oneDNN where it is used: MKL is more accurate on Intel processors, and what
    is held to its accuracy there is MKL."""
    if request.param == "onednn" and gemm.why_not_onednn():
        pytest.skip(f"oneDNN's products are not used here: {gemm.why_not_onednn()}")
    reason = "" if request.param == "onednn" else "this test uses torch's own GEMM"
    monkeypatch.setattr(gemm, "why_not_onednn", lambda: reason)
    from transformer_fast import backends

    backends._select.cache_clear()
    yield request.param
    backends._select.cache_clear()


def reference(x, weight, bias, activation):
    y = F.linear(x, weight, bias)
    return y if activation is None else eager.bias_activation(y, None, None, activation)


def run(function, inputs, grad, dtype=None):
    leaves = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_(t.requires_grad) for t in inputs]
    y = function(*leaves)
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    return y.detach(), torch.autograd.grad(y, wanted, grad.to(y.dtype)) if wanted else ()


def check(function, plain, inputs, grad):
    ours, theirs = run(function, inputs, grad), run(plain, inputs, grad)
    truth = run(plain, inputs, grad, torch.float64)
    assert_as_accurate(ours[0], truth[0], theirs[0])
    for i, (a, t, e) in enumerate(zip(ours[1], truth[1], theirs[1])):
        assert_as_accurate(a, t, e, GRADIENT, name=f"gradient {i}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_linear(route, dtype):
    @settings(max_examples=30, deadline=None, derandomize=True)
    @given(
        batch=st.sampled_from([(), (1,), (7,), (2, 5), (40,)]),
        inner=st.sampled_from([1, 2, 16, 33, 64]),
        outer=st.sampled_from([1, 3, 16, 50, 96]),
        activation=st.sampled_from(ACTIVATIONS),
        biased=st.booleans(),
        needs=st.tuples(st.booleans(), st.booleans(), st.booleans()),
        seed=st.integers(0, 1000),
    )
    def property(batch, inner, outer, activation, biased, needs, seed):
        g = torch.Generator().manual_seed(seed)
        x, w, b = (torch.randn(s, generator=g).to(dtype) for s in ((*batch, inner), (outer, inner), (outer,)))
        for t, need in zip((x, w, b), needs):
            t.requires_grad_(need)
        grad = torch.randn(*batch, outer, generator=g).to(dtype)
        check(
            lambda x, w, b: tf.linear(x, w, b, activation),
            lambda x, w, b: reference(x, w, b, activation),
            (x, w, b if biased else None),
            grad,
        )

    property()


@pytest.mark.quick
def test_strided_tensors(route):
    wide = torch.randn(30, 50)
    for x in (wide[:, 3:23], wide[::2, :20], wide.t()[:20, :20], wide[:, :40:2], wide[3, :20].expand(6, 20)):
        weight = torch.randn(40, 12).t()[:, 5:25]
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        grad = torch.randn(1, 12).expand(x.shape[0], 12)
        check(lambda x, w: tf.linear(x, w, None, "gelu"), lambda x, w: reference(x, w, None, "gelu"), (x, weight), grad)


@pytest.mark.quick
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_strided_biases(route, activation):
    x, w, grad = torch.randn(8, 16, requires_grad=True), torch.randn(32, 16, requires_grad=True), torch.randn(8, 32)
    for b in (torch.randn(32, 3)[:, 1], torch.ones(1).expand(32), torch.randn(70)[5:69:2]):
        b = b.detach().requires_grad_()
        check(lambda *t: tf.linear(*t, activation), lambda *t: reference(*t, activation), (x, w, b), grad)
        with torch.no_grad():
            y = tf.projections(x, [w, w], [b, b])[1]
            assert_as_accurate(y, F.linear(x.double(), w.double(), b.double()), F.linear(x, w, b))


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_bias_is_added_before_the_sum_is_rounded(route, dtype, activation):
    """Otherwise relu's mask changes where the sum is near zero."""
    x, w, b = (t.to(dtype).requires_grad_() for t in (torch.randn(64, 96), torch.randn(128, 96) / 10, torch.randn(128)))
    grad = torch.randn(64, 128)
    plain = lambda *t: reference(*t, activation)  # noqa: E731
    check(lambda *t: tf.linear(*t, activation), plain, (x, w, b), grad)
    with torch.no_grad():
        y = tf.linear(x, w, b, activation)
        assert_as_accurate(y, plain(*(t.double() for t in (x, w, b))), plain(x, w, b))
        assert torch.equal(y > 0, F.linear(x, w, b) > 0)


@pytest.mark.quick
@pytest.mark.parametrize("shape,out", [((0, 5), 3), ((2, 0, 5), 3), ((4, 0), 3), ((4, 5), 0)])
def test_empty(route, shape, out):
    x, w, b = (torch.randn(s, requires_grad=True) for s in (shape, (out, shape[-1]), (out,)))
    y = tf.linear(x, w, b, "gelu")
    assert y.shape == (*shape[:-1], out)
    y.sum().backward()
    assert x.grad.shape == x.shape and w.grad.shape == w.shape and b.grad.shape == b.shape


@pytest.mark.quick
def test_gradient_of_gradient(route):
    x, w, b = (torch.randn(s, requires_grad=True) for s in ((4, 6), (5, 6), (5,)))

    def second(function, dtype=torch.float32):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, w, b)]
        gx, gw = torch.autograd.grad(function(*leaves).square().sum(), leaves[:2], create_graph=True)
        return torch.autograd.grad(gx.square().sum() + gw.square().sum(), leaves)

    for a, t, e in zip(second(tf.linear), second(F.linear, torch.float64), second(F.linear)):
        assert_as_accurate(a, t, e, GRADIENT)


@pytest.mark.quick
def test_autocast_is_that_of_torch(route):
    x, w, b = torch.randn(3, 8), torch.randn(5, 8, requires_grad=True), torch.randn(5, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for y in (tf.linear(x, w, b), *tf.projections(x, [w, w], [b, b])):
            assert y.dtype == torch.bfloat16 and torch.equal(y, F.linear(x, w, b))
        assert tf.linear(x, w, b, "gelu").dtype == torch.bfloat16


@pytest.mark.quick
def test_forcing_eager_is_plain_torch():
    x, w, b = torch.randn(30, 64), torch.randn(48, 64), torch.randn(48)
    with tf.backend("eager"):
        assert torch.equal(tf.linear(x, w, b), F.linear(x, w, b))


@pytest.mark.quick
def test_compiles_without_a_break(route):
    x, w, b = (torch.randn(s, requires_grad=True) for s in ((4, 6), (5, 6), (5,)))
    compiled = torch.compile(lambda x, w, b: tf.linear(x, w, b, "gelu"), fullgraph=True, backend="aot_eager")
    check(compiled, lambda x, w, b: reference(x, w, b, "gelu"), (x, w, b), torch.randn(4, 5))


@pytest.mark.parametrize("isa", native.supported_isas())
@pytest.mark.parametrize("transposed", [False, True])
def test_long_sums(isa, transposed, monkeypatch):
    """Sums of thousands of products, for any number of rows and outputs, have running sums as short as torch's BLAS."""
    monkeypatch.setattr(gemm, "why_not_onednn", lambda: "")
    from transformer_fast import backends

    backends._select.cache_clear()
    before = native.current_isa()
    native.set_isa(isa)
    try:
        for rows, inner, outer, activation in ((70, 8192, 160, None), (5, 4099, 90, "gelu"), (283, 600, 33, "relu")):
            x, b = torch.randn(rows, inner + 3)[:, 2:-1], torch.randn(outer * 2)[::2]
            w = torch.randn(inner, outer).t() if transposed else torch.randn(outer, inner)
            for bias in (b, None):
                y = tf.linear(x, w, bias, activation)
                truth = reference(*(None if t is None else t.double() for t in (x, w, bias)), activation)
                assert_as_accurate(y, truth, reference(x, w, bias, activation), name=str((rows, inner, outer)))
    finally:
        native.set_isa(before)
        backends._select.cache_clear()


@pytest.mark.parametrize("isa", native.supported_isas())
def test_long_sums_of_one_sign(isa, monkeypatch):
    """With numbers of one sign errors grow with the length of a running sum: hundreds of inputs, or thousands of rows
    and outputs."""
    monkeypatch.setattr(gemm, "why_not_onednn", lambda: "")
    from transformer_fast import backends

    backends._select.cache_clear()
    before = native.current_isa()
    native.set_isa(isa)
    torch.manual_seed(0)
    try:
        for rows, inner, outer in ((90, 224, 130), (90, 448, 130), (20, 600, 1100), (1100, 40, 50)):
            x, w = torch.rand(rows, inner).requires_grad_(), torch.rand(outer, inner).requires_grad_()
            grad = torch.rand(rows, outer)
            check(tf.linear, F.linear, (x, w), grad)
            check(lambda x, w: tf.projections(x, [w, w])[1], F.linear, (x, w), grad)
            check(lambda x, w: sum(tf.projections(x, [w, w])), lambda x, w: 2 * F.linear(x, w), (x, w), grad)
        x, w = torch.rand(8, 20000), torch.rand(39, 20000)  # few rows: one running sum per vector lane
        check(lambda x, w: tf.projections(x, [w])[0], F.linear, (x, w), None)
        check(tf.linear, F.linear, (x, w), None)
    finally:
        native.set_isa(before)
        backends._select.cache_clear()


# ---- projections ---------------------------------------------------------------------------------
def parameters_of(sizes=(5, 5, 7), inner=6, dtype=torch.float32, bare=()):
    layers = [torch.nn.Linear(inner, n, i not in bare, dtype=dtype) for i, n in enumerate(sizes)]
    return [layer.weight for layer in layers] + [layer.bias for layer in layers]


def one_by_one(x, *parameters):
    n = len(parameters) // 2
    return torch.cat([F.linear(x, w, b) for w, b in zip(parameters[:n], parameters[n:])], -1)


def together(x, *parameters):
    n = len(parameters) // 2
    return torch.cat(tf.projections(x, parameters[:n], parameters[n:]), -1)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "frozen,bare",
    [((), ()), ((1,), ()), ((0, 4), ()), ((0, 1, 2), (1,)), ((), (0, 1, 2)), ((0, 1, 2, 3, 4, 5, 6), ())],
)
def test_projections(route, dtype, frozen, bare):
    parameters = parameters_of(dtype=dtype, bare=bare)
    x = torch.randn(2, 9, 6, dtype=dtype, requires_grad=True)
    for i in frozen:
        if (x, *parameters)[i] is not None:
            (x, *parameters)[i].requires_grad_(False)
    check(together, one_by_one, (x, *parameters), torch.randn(2, 9, 17, dtype=dtype))


def test_projections_that_nothing_is_asked_of(route):
    """Some outputs are not used, and some share a weight."""
    w, b, *_ = [torch.randn(5, 6, requires_grad=True), torch.randn(5, requires_grad=True)]
    x = torch.randn(4, 6, requires_grad=True)
    grad = torch.randn(4, 5)
    check(lambda x, w, b: tf.projections(x, [w, w, w], [b, None, b])[1], lambda x, w, b: F.linear(x, w) + 0 * b.sum(),
          (x, w, b.detach()), grad)  # fmt: skip
    check(lambda x, w, b: sum(tf.projections(x, [w, w], [b, None])), lambda x, w, b: 2 * F.linear(x, w) + b,
          (x, w, b), grad)  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("isa", native.supported_isas())
def test_projections_of_few_rows(isa, monkeypatch):
    """In inference, one pass over the weights in place: any number of rows, sizes and strides."""
    monkeypatch.setattr(gemm, "why_not_onednn", lambda: "")
    from transformer_fast import backends

    backends._select.cache_clear()
    before = native.current_isa()
    native.set_isa(isa)
    try:
        for rows in (1, 2, 3, 8, 9, 21, 64, 65):
            for inner, sizes in ((1, (1, 33)), (17, (32, 5, 70)), (200, (64, 64, 31))):
                weights = [torch.randn(n, inner + 3)[:, 3:] for n in sizes]
                biases = [None, *(torch.randn(n) for n in sizes[1:])]
                x = torch.randn(rows, inner) if rows != 8 else torch.randn(2, 4, inner)
                found = tf.projections(x, weights, biases)
                for y, w, b in zip(found, weights, biases):
                    truth = F.linear(x.double(), w.double(), None if b is None else b.double())
                    assert_as_accurate(y, truth, F.linear(x, w, b))
    finally:
        native.set_isa(before)
        backends._select.cache_clear()


@pytest.mark.parametrize("out", [1, 2, 7, 11])
def test_few_outputs_are_as_exact_as_dot_products(route, out):
    torch.manual_seed(0)
    x, w = torch.randn(500, 256), torch.randn(out, 256)
    for activation in (None, "gelu"):
        plain = lambda x, w: reference(x, w, None, activation)  # noqa: B023, E731
        assert_as_accurate(tf.linear(x, w, None, activation), plain(x.double(), w.double()), plain(x, w))


@pytest.mark.parametrize("activation", [None, "relu"])
def test_onednn_gets_no_weight_with_gaps(route, activation, monkeypatch):
    """oneDNN only has reference loops for those, a thousand times slower than its kernels."""
    x = torch.randn(70, 40, requires_grad=True)
    gaps = torch.randn(20, 50)[:, 5:45], torch.randn(50, 20)[5:45].t(), torch.randn(50, 90)[5:45, 7:27].t()
    seen, packet = [], torch.ops.mkldnn._linear_pointwise

    def default(x, w, *more):
        seen.append(w)
        return packet.default(x, w, *more)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", types.SimpleNamespace(default=default))
    for w in gaps:
        check(
            lambda x, w, b: tf.linear(x, w, b, activation),
            lambda x, w, b: reference(x, w, b, activation),
            (x, w.requires_grad_(), None),
            torch.randn(70, 20),
        )
    assert bool(seen) == (route == "onednn")
    for w in seen:
        assert w.stride() in ((w.shape[1], 1), (1, w.shape[0]))


class Wrapped(torch.Tensor):
    pass


@pytest.mark.quick
def test_projections_are_those_of_linear():
    x, a, b = torch.randn(2, 4), torch.nn.Parameter(torch.randn(3, 4)), torch.randn(3, 4)
    for weights in ([a, a], [a, b.as_subclass(Wrapped)], [a.detach(), tf.to_panels(b)]):
        with torch.no_grad():
            for y, w in zip(tf.projections(x, weights), (a, b if weights[1] is not a else a)):
                assert_as_accurate(y, F.linear(x.double(), w.double()), F.linear(x, w))


@pytest.mark.quick
@pytest.mark.parametrize(
    "call,error,pattern",
    [
        (lambda: tf.linear(torch.randn(2, 3), torch.randn(5, 4)), ValueError, r"input.*\(\.\.\., 4\).*\(2, 3\)"),
        (lambda: tf.linear(torch.randn(2, 4), torch.empty(5, 4, device="meta")), ValueError, "weight.*meta.*cpu"),
        (
            lambda: tf.linear(torch.randn(2, 4), torch.randn(5, 4), torch.empty(5, device="meta")),
            ValueError,
            "bias.*meta.*cpu",
        ),
        (
            lambda: tf.projections(torch.randn(2, 4), [torch.randn(5, 4), torch.empty(5, 4, device="meta")]),
            ValueError,
            "weight.*meta.*cpu",
        ),
        (lambda: tf.linear(torch.randn(2, 4), torch.randn(4)), ValueError, r"weight.*\(out, in\)"),
        (lambda: tf.linear(torch.randn(2, 4), torch.randn(5, 4), torch.randn(4)), ValueError, r"bias.*\(5,\)"),
        (lambda: tf.linear(torch.ones(2, 4, dtype=torch.int32), torch.randn(5, 4)), TypeError, "input.*int32"),
        (lambda: tf.linear(torch.randn(2, 4), torch.randn(5, 4), None, "tanh"), ValueError, "activation.*'tanh'"),
        (lambda: tf.projections(torch.randn(2, 4), []), ValueError, "weights.*none"),
        (lambda: tf.projections(torch.randn(2, 4), [torch.randn(5, 4)], []), ValueError, "biases.*1.*0"),
        (lambda: tf.projections(torch.randn(2, 4), [torch.randn(5, 3)]), ValueError, r"input.*3.*\(2, 4\)"),
        (lambda: tf.to_panels(torch.randn(4)), ValueError, r"weight.*\(out, in\)"),
        (lambda: tf.to_panels(torch.randn(4, 4), torch.int16), TypeError, "dtype.*int16"),
        (
            lambda: tf.linear(torch.randn(2, 4, requires_grad=True), tf.to_panels(torch.randn(5, 4))),
            ValueError,
            "PanelWeight.*no_grad",
        ),
    ],
)
def test_bad_input(call, error, pattern):
    with pytest.raises(error, match=pattern):
        call()


def saved_bytes(call):
    """The result, and the size of what autograd saves for it, beyond its inputs' own memory."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        return call(), sum(kept.values())


CALLS = {
    "linear": (tf.linear, F.linear),
    "projections": (
        lambda x, w, b: torch.cat(tf.projections(x, [w, w.clone()], [b, b]), -1),
        lambda x, w, b: torch.cat([F.linear(x, w, b), F.linear(x, w.clone(), b)], -1),
    ),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("needs", [(x, w, b) for x in (0, 1) for w in (0, 1) for b in (0, 1)][1:], ids=str)
def test_saves_what_torch_saves(route, name, dtype, needs):
    inputs = [torch.randn(s).to(dtype).requires_grad_(bool(n)) for s, n in zip(((40, 24), (32, 24), (32,)), needs)]
    (_, ours), (_, theirs) = (saved_bytes(lambda f=f: f(*inputs)) for f in CALLS[name])
    assert ours <= theirs


@pytest.mark.quick
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_what_is_not_saved_may_change(route, name, dtype, activation):
    """A bias; the input of a frozen layer; the weight where the input needs no gradient; inference tensors."""
    if name == "projections" and activation:
        return  # projections have none
    call = (lambda *a: tf.linear(*a, activation)) if name == "linear" else CALLS[name][0]
    x, w, b = (torch.randn(s).to(dtype).requires_grad_() for s in ((40, 24), (32, 24), (32,)))
    y = call(x, w, b)
    with torch.no_grad():
        b.add_(1)
    y.sum().backward()
    hidden = x * 1
    y = call(hidden, w.detach(), b)
    hidden.add_(1)
    (y.sum() + hidden.sum()).backward()
    y = call(x.detach(), w, b)
    with torch.no_grad():
        w.add_(1)
    y.sum().backward()
    with torch.inference_mode():
        constant = torch.zeros(32, dtype=dtype)
    call(x, w, constant).sum().backward()
