"""linear and packed_linear: the machine's fastest GEMM, several weights as one, and when torch's own takes over."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import GRADIENT, assert_as_accurate

import transformer_fast as tf
from transformer_fast.backends import eager, gemm, native
from transformer_fast.ops.linear import adjacent, pack_storage

if native.load():
    pytest.skip(native.load(), allow_module_level=True)

ACTIVATIONS = [None, "gelu", "gelu_tanh", "relu", "silu"]


@pytest.fixture(params=["onednn", "blas"])
def route(request, monkeypatch):
    """Both GEMMs, whichever this processor prefers."""
    if request.param == "onednn" and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch was built without oneDNN")
    reason = "" if request.param == "onednn" else "the test wants torch's own"
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
            y = tf.packed_linear(x, [w, w], [b, b])
            assert_as_accurate(y[:, 32:], F.linear(x.double(), w.double(), b.double()), F.linear(x, w, b))


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_bias_is_added_before_the_sum_is_rounded(route, dtype, activation):
    """Else relu's mask is another one wherever the sum is near zero."""
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
        for y in (tf.linear(x, w, b), tf.packed_linear(x, [w, w], [b, b])[:, :5]):
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


# ---- packed_linear -------------------------------------------------------------------------------
def projections(sizes=(5, 5, 7), inner=6, dtype=torch.float32):
    return [torch.nn.Linear(inner, n, dtype=dtype) for n in sizes]


def one_by_one(x, *parameters):
    n = len(parameters) // 2
    return torch.cat([F.linear(x, w, b) for w, b in zip(parameters[:n], parameters[n:])], -1)


def together(x, *parameters):
    n = len(parameters) // 2
    return tf.packed_linear(x, parameters[:n], parameters[n:])


@pytest.mark.quick
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("frozen", [(), (1,), (0, 4), (0, 1, 2), (0, 1, 2, 3, 4, 5, 6)])
def test_packed_linear(route, packed, dtype, frozen):
    layers = projections(dtype=dtype)
    parameters = [p.weight for p in layers] + [p.bias for p in layers]
    if packed:
        assert pack_storage(parameters[:3]) and pack_storage(parameters[3:])
    x = torch.randn(2, 9, 6, dtype=dtype, requires_grad=True)
    for i in frozen:
        (x, *parameters)[i].requires_grad_(False)
    grad = torch.randn(2, 9, 17, dtype=dtype)
    y, found = together(x, *parameters), []
    if frozen != tuple(range(7)):
        wanted = [t for t in (x, *parameters) if t.requires_grad]
        found = torch.autograd.grad(y, wanted, grad)
    theirs = run(one_by_one, (x, *parameters), grad)
    truth = run(one_by_one, (x, *parameters), grad, torch.float64)
    assert_as_accurate(y.detach(), truth[0], theirs[0])
    assert len(found) == len(truth[1])
    for a, t, e in zip(found, truth[1], theirs[1]):
        assert_as_accurate(a, t, e, GRADIENT)


@pytest.mark.quick
def test_packing_keeps_parameters_and_their_values():
    layers = projections()
    before = [(layer.weight, layer.weight.clone()) for layer in layers]
    assert adjacent([layer.weight for layer in layers]) is None
    assert pack_storage([layer.weight for layer in layers])
    whole = adjacent([layer.weight for layer in layers])
    assert whole.shape == (17, 6) and whole.data_ptr() == layers[0].weight.data_ptr()
    for layer, (parameter, value) in zip(layers, before):
        assert layer.weight is parameter and torch.equal(parameter, value) and parameter.is_leaf
    with torch.no_grad():
        layers[1].weight.fill_(3.0)  # what changes a parameter changes the whole
    assert (whole[5:10] == 3).all() and not (whole[:5] == 3).any()
    assert pack_storage([layer.weight for layer in layers])  # again: nothing to do
    assert whole.data_ptr() == layers[0].weight.data_ptr()


@pytest.mark.quick
def test_what_moves_parameters_only_ends_the_sharing():
    module = torch.nn.ModuleList(projections())
    pack_storage([layer.weight for layer in module])
    for moved in (copy.deepcopy(module), copy.deepcopy(module).to(torch.bfloat16)):
        x = torch.randn(3, 6, dtype=moved[0].weight.dtype)
        y = tf.packed_linear(x, [layer.weight for layer in moved], [layer.bias for layer in moved])
        assert_as_accurate(
            y[:, 5:10].detach(), copy.deepcopy(moved[1]).double()(x.double()).detach(), moved[1](x).detach()
        )
        assert pack_storage([layer.weight for layer in moved])
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    for name, value in torch.load(buffer).items():
        assert torch.equal(value, module.state_dict()[name])


@pytest.mark.quick
def test_training_packed_parameters_is_training_parameters():
    start = torch.nn.ModuleList(projections())
    x = torch.randn(8, 6)

    def train(function, model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(5):
            optimizer.zero_grad()
            inputs = x.to(model[0].weight.dtype)
            function(inputs, *(m.weight for m in model), *(m.bias for m in model)).square().mean().backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    packed = copy.deepcopy(start)
    assert pack_storage([layer.weight for layer in packed])
    ours, theirs = train(together, packed), train(one_by_one, copy.deepcopy(start))
    truth = train(one_by_one, copy.deepcopy(start).double())
    for a, t, e in zip(ours, truth, theirs):
        assert_as_accurate(a, t, e)
    assert adjacent([layer.weight for layer in packed]) is not None


class Wrapped(torch.Tensor):
    pass


@pytest.mark.quick
def test_what_is_never_packed():
    a, b = torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(3, 4))
    assert not pack_storage([a, a])
    assert not pack_storage([a, torch.nn.Parameter(torch.randn(3, 5))])
    assert not pack_storage([a, torch.nn.Parameter(torch.randn(3, 4, dtype=torch.bfloat16))])
    assert not pack_storage([a, torch.nn.Parameter(torch.randn(3, 4, device="meta"))])
    assert not pack_storage([a, torch.randn(3, 4).as_subclass(Wrapped)])
    shared = torch.nn.Parameter(torch.randn(3, 4).share_memory_())
    assert not pack_storage([a, shared]) and shared.is_shared()
    whole = torch.randn(6, 4)
    assert adjacent([whole[3:], whole[:3]]) is None
    assert adjacent([whole[:3].t(), whole[3:].t()]) is None
    assert adjacent([whole[:3], whole[3:].as_subclass(Wrapped)]) is None
    assert adjacent([whole[:3], whole[3:]]).data_ptr() == whole.data_ptr()
    x = torch.randn(2, 4)
    assert torch.equal(tf.packed_linear(x, [a, a]), torch.cat([tf.linear(x, a)] * 2, -1))
    assert tf.packed_linear(x, [a, b.as_subclass(Wrapped)]).shape == (2, 6)


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
            lambda: tf.packed_linear(torch.randn(2, 4), [torch.randn(5, 4), torch.empty(5, 4, device="meta")]),
            ValueError,
            "weight.*meta.*cpu",
        ),
        (lambda: tf.linear(torch.randn(2, 4), torch.randn(4)), ValueError, r"weight.*\(out, in\)"),
        (lambda: tf.linear(torch.randn(2, 4), torch.randn(5, 4), torch.randn(4)), ValueError, r"bias.*\(5,\)"),
        (lambda: tf.linear(torch.ones(2, 4, dtype=torch.int32), torch.randn(5, 4)), TypeError, "input.*int32"),
        (lambda: tf.linear(torch.randn(2, 4), torch.randn(5, 4), None, "tanh"), ValueError, "activation.*'tanh'"),
        (lambda: tf.packed_linear(torch.randn(2, 4), []), ValueError, "weights.*none"),
        (lambda: tf.packed_linear(torch.randn(2, 4), [torch.randn(5, 4)], []), ValueError, "biases.*1.*0"),
        (lambda: tf.pack_weight(torch.randn(4)), ValueError, r"weight.*\(out, in\)"),
        (lambda: tf.pack_weight(torch.randn(4, 4), torch.int16), TypeError, "dtype.*int16"),
        (
            lambda: tf.linear(torch.randn(2, 4, requires_grad=True), tf.pack_weight(torch.randn(5, 4))),
            ValueError,
            "PackedWeight.*no_grad",
        ),
    ],
)
def test_bad_input(call, error, pattern):
    with pytest.raises(error, match=pattern):
        call()
