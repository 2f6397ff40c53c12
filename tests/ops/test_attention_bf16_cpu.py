"""bfloat16 attention on the CPU where its products are of pairs or of tiles: sizes around the edges of tiles, and what
lies beside a tile's data in memory."""

import pytest
import torch
from attention_cases import Case, check
from instruction_sets import running_on

import transformer_fast as tf
from transformer_fast.backends import native

if native.load():
    pytest.skip(native.load(), allow_module_level=True)

BF16 = torch.bfloat16
LENGTHS = [1, 15, 16, 17, 31, 33, 127, 129]


@pytest.fixture(params=native.supported_isas())
def isa(request):
    with running_on(request.param) as isa:
        yield isa


@pytest.mark.parametrize("keys", LENGTHS)
def test_numbers_of_keys(isa, keys):
    check(Case(2, 2, 1, 40, keys, 64, BF16))


@pytest.mark.parametrize("queries", LENGTHS)
def test_numbers_of_queries(isa, queries):
    check(Case(1, 2, 2, queries, 70, 64, BF16))
    check(Case(1, 2, 2, queries, queries, 40, BF16, is_causal=True))


@pytest.mark.parametrize("dim", [1, 2, 8, 31, 32, 33, 64, 80, 128, 129, 256])
@pytest.mark.quick
def test_head_dims(isa, dim):
    check(Case(1, 2, 1, 50, 75, dim, BF16))


@pytest.mark.parametrize("keys", [31, 33, 129, 300])
@pytest.mark.parametrize(
    "features",
    [
        {"dropout_p": 0.2},
        {"bias_axes": (0, 1, 1, 1), "dropout_p": 0.1},
        {"window": (17, 9)},
        {"window": (3, None), "is_causal": True, "causal_alignment": "bottom_right"},
        {"softcap": 10.0, "mask_axes": (1, 0, 1, 1)},
        {"lengths": [1, 30], "buckets": 8},
        {"scale": -0.3},
    ],
    ids=lambda f: "-".join(f),
)
def test_features(isa, keys, features):
    check(Case(2, 2, 1, 33, keys, 40, BF16, **features))


@pytest.mark.parametrize("keys", [1030, 1100])
def test_more_keys_than_are_held(isa, keys):
    check(Case(1, 1, 1, 33, keys, 24, BF16))
    check(Case(1, 1, 1, 33, keys, 24, BF16, window=(1029, None), softcap=15.0))


def run(q, k, v, grad, **more):
    """out and the gradients of q, k, v."""
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    out = tf.scaled_dot_product_attention(*leaves, **more)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dim", [33, 64])
def test_what_follows_a_sequence_does_not_reach_it(isa, value, dim):
    """Keys and values past a sequence's length, and past what a causal call sees."""
    lengths = torch.tensor([37, 128, 1, 15])
    q, grad = (torch.randn(4, 2, 45, dim, dtype=BF16) for _ in range(2))
    k, v = (torch.randn(4, 2, 160, dim, dtype=BF16) for _ in range(2))
    past = (torch.arange(160) >= lengths[:, None])[:, None, :, None]
    clean = run(q, k.masked_fill(past, 0.0), v.masked_fill(past, 0.0), grad, key_lengths=lengths)
    dirty = run(q, k.masked_fill(past, value), v.masked_fill(past, value), grad, key_lengths=lengths)
    for a, b in zip(clean, dirty):
        assert torch.equal(a, b) and a.isfinite().all()
    unseen = (torch.arange(160) >= 45)[:, None]
    clean = run(q, k.masked_fill(unseen, 0.0), v.masked_fill(unseen, 0.0), grad, is_causal=True)
    dirty = run(q, k.masked_fill(unseen, value), v.masked_fill(unseen, value), grad, is_causal=True)
    for a, b in zip(clean, dirty):
        assert torch.equal(a, b) and a.isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_sequence_does_not_reach_its_neighbours(isa, value):
    """Unpadded sequences lie side by side; a tile of one ends inside the next."""
    lengths = [37, 16, 33, 1, 130]
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    q, k, v, grad = (torch.randn(sum(lengths), 2, 40, dtype=BF16) for _ in range(4))

    def gradients(bad):
        leaves = [t.clone() for t in (q, k, v)]
        for t in leaves if bad else ():
            for b in (1, 3):
                t[cu[b] : cu[b + 1]] = value
        leaves = [t.requires_grad_() for t in leaves]
        out = tf.varlen_attention(*leaves, cu)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    for clean, dirty in zip(gradients(False), gradients(True)):
        for b in (0, 2, 4):
            assert torch.equal(clean[cu[b] : cu[b + 1]], dirty[cu[b] : cu[b + 1]])
            assert clean[cu[b] : cu[b + 1]].isfinite().all()


def test_columns_beside_the_heads_are_not_read(isa):
    """Heads that are slices of wider rows, with an odd head dim, so that a pair would reach into the neighbour."""
    wide = [torch.full((2, 50, 3, 40), float("nan"), dtype=BF16) for _ in range(4)]
    for t in wide:
        t[..., 3:36] = torch.randn(2, 50, 3, 33)
    q, k, v, grad = (t[..., 3:36].transpose(1, 2) for t in wide)
    packed = run(*(t.contiguous() for t in (q, k, v, grad)))
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = tf.scaled_dot_product_attention(*leaves)
    for a, b in zip(packed, [out.detach(), *torch.autograd.grad(out, leaves, grad)]):
        assert torch.equal(a, b) and a.isfinite().all()


def test_denormal_numbers_count_as_zeros_at_most(isa):
    """Tiles take them for zeros, which moves a result by less than a denormal times the number of terms."""
    q, k = (torch.randn(1, 2, 40, 32, dtype=BF16) for _ in range(2))
    v = torch.full((1, 2, 40, 32), 1e-39, dtype=BF16)
    out = tf.scaled_dot_product_attention(q, k, v)
    assert ((out == 0) | (out - v).abs().le(v * 2**-4)).all()
