"""Keras's attention layers: values computed by hand, the full formulas, and masks with Keras's meaning."""

import math

import pytest
import torch
from numerics import GRADIENT, assert_as_accurate, pooled

from transformer_fast import backend
from transformer_fast.layers import AdditiveAttention, DotProductAttention, MultiHeadAttention

pytestmark = pytest.mark.quick
LN2, LN3 = math.log(2), math.log(3)


def by_hand(found, numbers):
    """Compare with values computed by hand, within float32's precision."""
    truth = torch.tensor(numbers, dtype=torch.float64)
    assert_as_accurate(found, truth, truth.float())


def rows(*values):
    """A batch (1, n, width) of the given vectors."""
    return torch.tensor([[list(v) for v in values]], dtype=torch.float32)


# ---- by hand ---------------------------------------------------------------------------------------
def test_dot_product_by_hand():
    """Scores ln 2 and 0: weights 2/3 and 1/3; 2/3 * 3 + 1/3 * 6 = 4."""
    inputs = [rows((1, 0)), rows((3,), (6,)), rows((LN2, 5), (0, 7))]
    out, weights = DotProductAttention()(inputs, return_attention_scores=True)
    by_hand(weights, [[[2 / 3, 1 / 3]]])
    by_hand(out, [[[4]]])
    # A scale of 2: scores ln 4 and 0, weights 4/5 and 1/5; 12/5 + 6/5 = 18/5.
    scaled = DotProductAttention(use_scale=True)
    by_hand(scaled(inputs), [[[4]]])  # the scale is initially 1
    torch.nn.init.constant_(scaled.scale, 2.0)
    by_hand(scaled(inputs), [[[18 / 5]]])


def test_values_are_keys_by_default():
    """q = (0, 0): equal weights; the mean of (2, 4) and (6, 8)."""
    by_hand(DotProductAttention()([rows((0, 0)), rows((2, 4), (6, 8))]), [[[4, 6]]])


def test_masks_by_hand():
    query, value = rows((0,), (0,), (0,)), rows((3,), (6,), (9,))
    mask = [torch.tensor([[True, False, True]]), torch.tensor([[True, True, False]])]
    for layer in (DotProductAttention(), DotProductAttention(score_mode="concat"), AdditiveAttention(use_scale=False)):
        # Keys are zero, so all scores that take part are equal.
        inputs = [query, value, torch.zeros(1, 3, 1)]
        by_hand(layer(inputs, mask=mask), [[[4.5], [0], [4.5]]])
        by_hand(layer(inputs, use_causal_mask=True), [[[3], [4.5], [6]]])
        # Keys {0}, {0, 1}, {0, 1}; the second query is masked out.
        out, weights = layer(inputs, mask, use_causal_mask=True, return_attention_scores=True)
        by_hand(out, [[[3], [0], [4.5]]])
        by_hand(weights, [[[1, 0, 0], [0.5, 0.5, 0], [0.5, 0.5, 0]]])
        by_hand(layer(inputs, mask=[None, torch.tensor([[0, 2, 1]])]), [[[7.5]] * 3])  # nonzero takes part


def test_additive_by_hand():
    """tanh(ln 3 / 2) = 1/2: scores 2 ln 2 * (1/2, 0) = (ln 2, 0), weights 2/3 and 1/3."""
    layer = AdditiveAttention()
    layer.build([(1, 1, 1)])
    torch.nn.init.constant_(layer.scale, 2 * LN2)
    out, weights = layer([rows((LN3 / 4,)), rows((3,), (6,)), rows((LN3 / 4,), (-LN3 / 4,))], None, False, True)
    by_hand(weights, [[[2 / 3, 1 / 3]]])
    by_hand(out, [[[4]]])
    # Luong's concat score is the additive score with one scalar as scale.
    concat = DotProductAttention(use_scale=True, score_mode="concat")
    torch.nn.init.constant_(concat.concat_score_weight, 2 * LN2)
    torch.nn.init.constant_(concat.scale, 0.5)
    by_hand(concat([rows((LN3 / 2,)), rows((3,), (6,)), rows((LN3 / 2,), (-LN3 / 2,))]), [[[4]]])


def test_multi_head_by_hand():
    """Two heads of key_dim 4, so scores are halved. Head 0: query (2, 0, 0, 0), keys (ln 2, 0, 0, 0) and 0: score ln 2.
    Head 1: query 0, weights 1/2. Values 3 and 6 give 4 and 4.5; the output is 10 * head 0 + head 1 + 1."""
    layer = MultiHeadAttention(2, 4, value_dim=1, output_shape=1)
    query_kernel, key_kernel = torch.zeros(1, 2, 4), torch.zeros(2, 2, 4)
    query_kernel[0, 0, 0], key_kernel[1, 0, 0] = 2, LN2
    layer.set_weights([
        query_kernel, torch.zeros(2, 4), key_kernel, torch.zeros(2, 4), torch.tensor([[[1.0], [1.0]], [[0.0], [0.0]]]),
        torch.zeros(2, 1), torch.tensor([[[10.0]], [[1.0]]]), torch.tensor([1.0]),
    ])  # fmt: skip
    query, value = rows((1,)), rows((3, 1), (6, 0))
    out, weights = layer(query, value, return_attention_scores=True)
    by_hand(weights, [[[[2 / 3, 1 / 3]], [[1 / 2, 1 / 2]]]])
    by_hand(out, [[[10 * 4 + 4.5 + 1]]])
    by_hand(layer(query, value, value_mask=torch.tensor([[False, True]])), [[[10 * 6 + 6 + 1]]])
    # Without keys to attend to the result is the output's bias.
    by_hand(layer(query, value, key_mask=torch.zeros(1, 2, dtype=torch.bool)), [[[1]]])


def test_windows_and_masks_of_pairs():
    """With equal scores the weights show how many keys a query attends to."""
    layer = MultiHeadAttention(1, 2, sliding_window=2)
    x = torch.randn(1, 4, 3)
    layer.build((3,), (3,))
    torch.nn.init.zeros_(layer.query_dense.weight)
    seen = layer(x, x, return_attention_scores=True)[1][0, 0]
    third = 1 / 3
    by_hand(seen, [[0.5, 0.5, 0, 0], [third] * 3 + [0], [0] + [third] * 3, [0, 0, 0.5, 0.5]])
    pairs = torch.eye(4, dtype=torch.bool)
    pairs[:, 0] = True
    for shape in ((4, 4), (1, 4, 4), (1, 1, 4, 4)):
        found = layer(x, x, attention_mask=pairs.view(shape), use_causal_mask=True, return_attention_scores=True)[1]
        by_hand(found[0, 0], [[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    masked = layer(x, x, query_mask=torch.tensor([[1, 1, 0, 1]]), return_attention_scores=True)[1][0, 0]
    assert masked[2].eq(0).all() and torch.equal(masked[:2], seen[:2])


# ---- against the formulas --------------------------------------------------------------------------
def formula(kind, query, value, key, scale, mask):
    if kind == "dot":
        scores = query @ key.transpose(1, 2) * scale
    else:
        scores = (scale * torch.tanh(query[:, :, None] + key[:, None])).sum(-1)
    weights = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
    return weights @ value, weights


@pytest.mark.parametrize("kind, width", [("dot", 24), ("dot", 300), ("additive", 24)])
def test_as_accurate_as_the_formula(kind, width):
    tensors = [torch.randn(2, n, w) * 0.5 for n, w in ((5, width), (7, 20), (7, width))]
    mask = torch.arange(7) < torch.tensor([7, 3])[:, None]
    layer = DotProductAttention(use_scale=True) if kind == "dot" else AdditiveAttention()
    layer([torch.zeros(1, 1, width)] * 2)
    torch.nn.init.normal_(layer.scale)
    results = []
    for dtype in (torch.float32, torch.float64, None):
        leaves = [t.to(dtype or torch.float32).requires_grad_() for t in tensors]
        scale = layer.scale if dtype is None else layer.scale.detach().to(dtype).requires_grad_()
        if dtype is None:
            out = layer(leaves, [None, mask], return_attention_scores=True)
            torch.testing.assert_close(layer(leaves, [None, mask]), out[0])  # the path without weights
        else:
            out = formula(kind, *leaves, scale, mask)
        gradients = torch.autograd.grad(sum(o.square().sum() for o in out), [*leaves, scale])
        results.append(([o.detach() for o in out], dict(zip(("query", "value", "key", "scale"), gradients))))
    (eager, eager_gradients), (truth, true_gradients), (ours, gradients) = results
    for a, b, c in zip(ours, truth, eager):
        assert_as_accurate(a, b, c)
    assert_as_accurate(*(pooled(g, true_gradients) for g in (gradients, true_gradients, eager_gradients)), GRADIENT)


def test_multi_head_as_torchs():
    theirs = torch.nn.MultiheadAttention(24, 3, batch_first=True)
    torch.nn.init.normal_(theirs.in_proj_bias)
    layer = MultiHeadAttention(3, 8)
    q, k, v = (w.t().reshape(24, 3, 8) for w in theirs.in_proj_weight.detach().chunk(3))
    biases = [b.reshape(3, 8) for b in theirs.in_proj_bias.detach().chunk(3)]
    out = theirs.out_proj
    layer.set_weights([
        q, biases[0], k, biases[1], v, biases[2], out.weight.detach().t().reshape(3, 8, 24), out.bias.detach(),
    ])  # fmt: skip
    query, key, value = torch.randn(2, 5, 24), torch.randn(2, 7, 24), torch.randn(2, 7, 24)
    found = layer(query, value, key, return_attention_scores=True)
    wanted = theirs(query, key, value, average_attn_weights=False)
    truth = theirs.double()(query.double(), key.double(), value.double(), average_attn_weights=False)
    for a, b, c in zip(found, truth, wanted):
        assert_as_accurate(a, b, c)


# ---- dropout, laziness, the ops ----------------------------------------------------------------------
@pytest.mark.parametrize("layer", [DotProductAttention(dropout=0.5), AdditiveAttention(dropout=0.5)], ids=str)
def test_dropout_in_training_alone(layer):
    inputs = [torch.randn(2, 5, 16), torch.randn(2, 7, 16)]
    assert not torch.equal(layer(inputs), layer(inputs))
    assert torch.equal(layer(inputs, training=False), layer(inputs, training=False))
    layer.eval()
    assert torch.equal(layer(inputs), layer(inputs)) and not torch.equal(layer(inputs, training=True), layer(inputs))


def test_widths_come_from_the_first_call():
    layer = MultiHeadAttention(2, 4, value_dim=3)
    out = layer(torch.randn(2, 5, 10), torch.randn(2, 7, 6))
    assert out.shape == (2, 5, 10)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters() if "weight" in name}
    assert shapes == {
        "query_dense.weight": (8, 10), "key_dense.weight": (8, 6), "value_dense.weight": (6, 6),
        "output_dense.weight": (10, 6),
    }  # fmt: skip
    again = MultiHeadAttention(2, 4, value_dim=3)
    again.load_state_dict(layer.state_dict())
    x = torch.randn(1, 3, 10), torch.randn(1, 4, 6)
    assert torch.equal(again(*x), layer(*x))


def test_they_are_on_our_ops(monkeypatch):
    from transformer_fast import ops

    called = []
    for name in ("scaled_dot_product_attention", "additive_attention"):
        op = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, _op=op, _name=name, **k: called.append(_name) or _op(*a, **k))
    x = torch.randn(1, 3, 8)
    DotProductAttention()([x, x]), AdditiveAttention()([x, x]), MultiHeadAttention(2, 4)(x, x)
    assert called == ["scaled_dot_product_attention", "additive_attention", "scaled_dot_product_attention"]
    with backend("eager"):
        assert DotProductAttention()([x, x]).shape == x.shape


X, Y = torch.randn(2, 3, 8), torch.randn(2, 5, 8)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: DotProductAttention(score_mode="general"), "score_mode: wanted 'dot' or 'concat', got 'general'"),
        (lambda: AdditiveAttention(dropout=1.5), r"dropout: wanted a number in \[0, 1\], got 1.5"),
        (lambda: DotProductAttention()(X), r"inputs: wanted a list \[query, value\].*got Tensor"),
        (lambda: AdditiveAttention()([X]), r"inputs: wanted a list .*got 1 of them"),
        (lambda: DotProductAttention()([X, Y[..., :4]]), "key: wanted width 8 as query has, got 4"),
        (lambda: DotProductAttention()([X, Y, Y[:, :4]]), "key: wanted 5 positions as value has, got 4"),
        (lambda: DotProductAttention()([X, Y[:1]]), r"value: wanted 3 dimensions, the first 2, got shape \(1, 5, 8\)"),
        (lambda: DotProductAttention()([X, Y.long()]), "value: wanted a float tensor, got torch.int64"),
        (lambda: DotProductAttention()([X, Y], mask=[None, torch.ones(2, 3, dtype=torch.bool)]),
         r"value_mask: wanted shape \(2, 5\), got \(2, 3\)"),
        (lambda: DotProductAttention()([X, Y], mask=[None, torch.ones(2, 5)]), "value_mask: wanted a bool or integer"),
        (lambda: DotProductAttention()([X, Y], mask=torch.ones(2, 5)), r"mask: wanted a list \[query_mask"),
        (lambda: MultiHeadAttention(0, 8), "num_heads: wanted an integer, at least 1, got 0"),
        (lambda: MultiHeadAttention(2, 300), r"key_dim: wanted an integer, 1..256, got 300"),
        (lambda: MultiHeadAttention(2, 4)(X, Y, key_mask=torch.ones(2, 4, dtype=torch.int)),
         r"key_mask: wanted shape \(2, 5\)"),
        (lambda: MultiHeadAttention(2, 4).set_weights([torch.zeros(1)] * 7), "weights: wanted 8 arrays, got 7"),
        (lambda: MultiHeadAttention(2, 4).set_weights([torch.zeros(8, 4, 2)] * 8),
         r"weights: wanted a kernel of shape \(E, 2, 4\) at 0, got \(8, 4, 2\)"),
    ],
)  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
