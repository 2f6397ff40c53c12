"""int8 products have the same bits on every instruction set as the definition in plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_as_accurate

from transformer_fast.backends import eager_int8, native
from transformer_fast.ops import linear_int8
from transformer_fast.ops.linear_int8 import Int8BlockWeights, Int8Norm, Int8Weight, int8_block
from transformer_fast.ops.linear_int8 import linear_int8 as product

pytestmark = pytest.mark.skipif(bool(native.load()), reason=native.load() or "there")
# Numbers of rows around those kept in registers and in a block; widths around groups, vectors and panels.
SHAPES = [(1, 1, 1), (5, 7, 3), (13, 129, 33), (50, 384, 65), (97, 130, 200), (3, 300, 1000)]


@pytest.fixture(params=[] if native.load() else native.supported_int8_isas())
def isa(request):
    before = native.current_int8_isa()
    native.set_int8_isa(request.param)
    yield request.param
    native.set_int8_isa(before)


def _case(rows, inner, out, seed=0):
    torch.manual_seed(seed)
    return torch.randn(rows, inner) * torch.rand(rows, 1) + 0.3, torch.randn(out, inner) * 0.1, torch.randn(out)


def _expected(x, q, scale, bias, group, dtype=torch.float32):
    y = eager_int8.linear_int8(x.reshape(-1, x.shape[-1]), q, scale, group)
    return eager_int8.finish(y, bias, None, dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group", linear_int8.GROUPS)
def test_bits_are_those_of_the_definition(isa, shape, group):
    x, weight, bias = _case(*shape)
    q, scale = linear_int8.quantize_weight(weight, group)
    assert all(torch.equal(*pair) for pair in zip((q, scale), eager_int8.quantize_weight(weight, group)))
    w = Int8Weight(q, scale, group)
    assert torch.equal(product(x, w, bias), _expected(x, q, scale, bias, group))
    for dtype in (torch.bfloat16, torch.float16):
        low = x.to(dtype)
        assert torch.equal(product(low, w, bias), _expected(low, q, scale, bias, group, dtype))
        assert torch.equal(product(low, w, bias, None, torch.float32), _expected(low, q, scale, bias, group))


@pytest.mark.parametrize("group", [128, 256])
def test_largest_products_do_not_saturate(isa, group):
    """Instructions that add byte products in 16 bits would give errors of thousands here."""
    x = torch.zeros(13, 256)
    x[:, 1::2] = 1.0
    x[:, ::4] = 1.0
    q = torch.full((70, 256), 127, dtype=torch.int8)
    q[1::2] = -127
    scale = torch.ones(70, 256 // group)
    found = product(x, Int8Weight(q, scale, group))
    assert torch.equal(found, _expected(x, q, scale, None, group))
    assert (found[0, 0] - x[0].sum() * 127).abs() < 1e-2 * 127


def test_weights_side_by_side_and_strides(isa):
    x, weight, bias = _case(20, 96, 100)
    pieces = list(weight.split([32, 61, 7]))
    biases = [b.contiguous() for b in bias.split([32, 61, 7])]
    wide = torch.randn(4, 5, 200)
    wide[..., 50:146] = x.view(4, 5, 96)
    weights = [Int8Weight.of(p) for p in pieces]
    found = product(wide[..., 50:146], weights, [biases[0], None, biases[2]])
    want = [_expected(x, *w.parts(), b, 128) for w, b in zip(weights, (biases[0], None, biases[2]))]
    assert torch.equal(found.view(20, 100), torch.cat(want, -1))
    assert torch.equal(product(x.t().contiguous().t(), weights[0]), _expected(x, *weights[0].parts(), None, 128))
    assert product(x[:0], weights[0]).shape == (0, 32)


def test_layout_round_trip(isa):
    for _, inner, out in SHAPES:
        for group in linear_int8.GROUPS:
            q, scale = linear_int8.quantize_weight(torch.randn(out, inner).t().contiguous().t(), group)
            assert all(torch.equal(*pair) for pair in zip(Int8Weight(q, scale, group).parts(), (q, scale)))


def test_rows_that_are_not_finite_are_nan_and_no_others(isa):
    x, weight, _ = _case(9, 200, 40)
    x[1, 3], x[4, 199], x[6, 130] = float("nan"), float("inf"), -float("inf")
    x[2], x[3] = 0.0, 1e-38
    found = product(x, Int8Weight.of(weight))
    odd = torch.tensor([r in (1, 4, 6) for r in range(9)])
    assert found[odd].isnan().all() and found[~odd].isfinite().all()
    assert not found[2:4].any()


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu"])
def test_activation(isa, activation):
    x, weight, bias = _case(30, 200, 70)
    w = Int8Weight.of(weight)
    y = _expected(x, *w.parts(), bias, 128)
    truth = eager_int8.finish(y.double(), None, activation, torch.float64)
    assert_as_accurate(product(x, w, bias, activation), truth, eager_int8.finish(y, None, activation, torch.float32), 2)


@pytest.mark.parametrize("group", linear_int8.GROUPS)
def test_error_is_within_the_steps(group):
    """The error bound: half a step of each input times the weights, plus half a step of each weight times the
    inputs."""
    x, weight, _ = _case(40, 300, 50)
    w = Int8Weight.of(weight, group)
    q, scale = w.parts()
    step_w = scale.repeat_interleave(group, 1)[:, :300].double()
    _, step_x, _ = eager_int8.quantize_rows(x, group)
    step_x = step_x.repeat_interleave(group, 1)[:, :300].double()
    exact = x.double() @ weight.double().t()
    # An input's zero point is rounded as well: a whole step at most.
    bound = step_x @ (q.double() * step_w).abs().t() + (x.double().abs() / 2) @ step_w.t()
    error = (product(x, w).double() - exact).abs()
    assert (error <= bound).all()
    assert error.norm() < 0.012 * exact.norm()  # the error of 8 bits for random numbers: half of 2^-7.5


def test_blocks_are_their_parts(isa):
    torch.manual_seed(3)
    cases = (
        (5, 32, 70, 32, False, (128, 128, 128)),
        (101, 130, 300, 64, True, (128, 128, 128)),
        (50, 260, 530, 64, True, (32, 256, 256)),
        (13, 64, 300, 260, False, (256, 64, 32)),
    )
    for rows, width, inner, heads, gated, (output, up, down) in cases:
        context, x = torch.randn(rows, heads), torch.randn(rows, width)
        sizes = [(width, heads), (inner, width), (inner, width), (width, inner)]
        floats = [torch.randn(s) * s[1] ** -0.5 for s in sizes]
        biases = [torch.randn(s[0]) for s in sizes]
        groups = (output, up, up, down)
        weights = [Int8Weight.of(f, group) for f, group in zip(floats, groups)]
        norms = [torch.rand(width) + 0.5 for _ in range(2)], [torch.randn(width) for _ in range(2)]
        for post in (True, False):
            if not gated:
                weights[2], biases[2] = None, None
            first, second = (Int8Norm(norms[0][i], norms[1][i], 1e-5) for i in range(2))
            w = Int8BlockWeights(*weights, tuple(biases), first if post else None, second, False, "gelu")
            assert not w.why_not()
            found = int8_block(context, x, w)
            truth = _block(
                context, x, [f.double() for f in floats], biases, first, second, post, gated, torch.float64, F.linear
            )
            parts = _block(context, x, weights, biases, first, second, post, gated, torch.float32, product)
            assert_as_accurate(found, truth, parts, 1.1)


def _block(context, x, weights, biases, first, second, post, gated, dtype, linear):
    context, x = context.to(dtype), x.to(dtype)
    biases = [b if b is None else b.to(dtype) for b in biases]
    norm = lambda n, v: F.layer_norm(v, v.shape[-1:], n.weight.to(dtype), n.bias.to(dtype), n.eps)  # noqa: E731
    r = x + linear(context, weights[0], biases[0])
    r = norm(first, r) if post else r
    h = r if post else norm(second, r)
    inner = F.gelu(linear(h, weights[1], biases[1]))
    if gated:
        inner = inner * linear(h, weights[2], biases[2])
    y = r + linear(inner, weights[3], biases[3])
    return norm(second, y) if post else y


def test_op_is_registered_and_traced():
    x, weight, bias = _case(5, 64, 40)
    w = Int8Weight.of(weight)
    torch.library.opcheck(
        torch.ops.transformer_fast.linear_int8.default, (x, [w.data], [bias], [40], 128, -1, torch.float32)
    )
    compiled = torch.compile(lambda t: product(t, w, bias) * 2, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), product(x, w, bias) * 2)


def test_definition_runs_where_there_is_no_kernel(monkeypatch):
    x, weight, bias = _case(6, 100, 40)
    panels = product(x, Int8Weight.of(weight), bias, "relu")
    monkeypatch.setattr(linear_int8.native, "load", lambda: "not here")
    w = Int8Weight.of(weight)
    assert w.data is None and torch.equal(product(x, w, bias, "relu"), panels)
    assert product(x[:0], w, bias).shape == (0, 40)


def test_groups_are_long_where_weights_are_wide():
    widths = (100, 256, 512, 640, 768, 1000, 1024, 3072)
    assert [linear_int8.group_of(n, 256) for n in widths] == [128, 128, 128, 128, 256, 128, 256, 256]
    assert {linear_int8.group_of(n, group) for n in widths for group in (32, 64, 128)} == {32, 64, 128}


def test_bad_input():
    x, weight, bias = _case(6, 100, 40)
    w = Int8Weight.of(weight)
    with pytest.raises(ValueError, match=r"input: wanted shape \(\.\.\., 100\)"):
        product(x[:, :9], w)
    with pytest.raises(ValueError, match=r"biases: wanted shape \(40,\), got \(39,\)"):
        product(x, w, bias[1:])
    with pytest.raises(TypeError, match="input: wanted a floating-point tensor"):
        product(x.int(), w)
    with pytest.raises(ValueError, match="activation: 'mish' is unknown"):
        product(x, w, bias, "mish")
    with pytest.raises(ValueError, match="input: int8 weights have no gradient"):
        product(x.requires_grad_(), w)
    with pytest.raises(ValueError, match="group: wanted one of 32, 64, 128, 256, got 48"):
        Int8Weight.of(weight, 48)
    blocks = Int8BlockWeights(
        w, w, Int8Weight.of(weight, 64), w, (None,) * 4, None, Int8Norm(None, None, 1e-5), True, "silu"
    )
    assert blocks.why_not() == "up and gate have different group sizes"
    weight[3, 4] = float("nan")
    with pytest.raises(ValueError, match="scale: wanted finite numbers, got NaN or infinity"):
        Int8Weight.of(weight)
