"""Every shape that torch's scaled_dot_product_attention accepts, compared with torch's math implementation."""

import pytest
import torch
import torch.nn.functional as F
from numerics import GRADIENT, assert_as_accurate
from torch.nn.attention import SDPBackend, sdpa_kernel

import transformer_fast as tf

# name: (query, key, value, keyword arguments)
SHAPES = {
    "two dimensions": ((5, 8), (9, 8), (9, 8), {}),
    "three": ((3, 5, 8), (3, 9, 8), (3, 9, 8), {"is_causal": True}),
    "five": ((2, 3, 4, 5, 8), (2, 3, 4, 9, 8), (2, 3, 4, 9, 8), {}),
    "five, shared heads": ((2, 3, 4, 5, 8), (2, 3, 2, 9, 8), (2, 3, 2, 9, 8), {"enable_gqa": True}),
    "heads and none": ((4, 5, 8), (2, 4, 9, 8), (2, 4, 9, 8), {}),
    "broadcast batch": ((3, 4, 5, 8), (1, 4, 9, 8), (1, 4, 9, 8), {}),
    "broadcast queries": ((1, 4, 5, 8), (3, 4, 9, 8), (3, 4, 9, 8), {}),
    "one key head": ((3, 4, 5, 8), (3, 1, 9, 8), (3, 1, 9, 8), {}),
    "one value head": ((3, 4, 5, 8), (3, 4, 9, 8), (3, 1, 9, 8), {}),
    "one query head": ((3, 1, 5, 8), (3, 4, 9, 8), (3, 4, 9, 8), {}),
    "narrow values": ((3, 4, 5, 8), (3, 4, 9, 8), (3, 4, 9, 3), {}),
    "wide values": ((3, 4, 5, 8), (3, 4, 9, 8), (3, 4, 9, 20), {"is_causal": True}),
}
MASKS = {"two dimensions": (5, 9), "three": (3, 5, 9), "five": (2, 1, 4, 5, 9), "broadcast batch": (3, 1, 1, 9)}


def _plain(*tensors, **more):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*tensors, **more)


def _check(ours, plain, tensors):
    def run(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        out = function(*leaves)
        weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).to(dtype).view(out.shape)
        return out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)

    for i, triple in enumerate(zip(run(ours, torch.float32), run(plain, torch.float64), run(plain, torch.float32))):
        assert_as_accurate(*triple, GRADIENT, f"result {i}")


@pytest.mark.quick
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name):
    *shapes, more = SHAPES[name]
    tensors = [torch.randn(s) for s in shapes]
    _check(
        lambda *t: tf.scaled_dot_product_attention(*t, **more), lambda *t: _plain(*t, **more), tensors
    )  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("name", MASKS)
def test_masks(name):
    *shapes, _ = SHAPES[name]
    tensors = [torch.randn(s) for s in shapes]
    mask, bias = torch.rand(MASKS[name]) > 0.2, torch.randn(MASKS[name])
    mask[..., 0] = True
    _check(
        lambda *t: tf.scaled_dot_product_attention(*t, attn_mask=mask), lambda *t: _plain(*t, attn_mask=mask), tensors
    )
    _check(
        lambda q, k, v, m: tf.scaled_dot_product_attention(q, k, v, m), lambda q, k, v, m: _plain(q, k, v, m),
        [*tensors, bias],
    )  # fmt: skip


@pytest.mark.quick
def test_lse_has_the_leading_dimensions():
    for name, shape in (
        ("two dimensions", (5,)),
        ("three", (3, 5)),
        ("five", (2, 3, 4, 5)),
        ("one key head", (3, 4, 5)),
    ):
        *shapes, _ = SHAPES[name]
        out, lse = tf.scaled_dot_product_attention(*(torch.randn(s) for s in shapes), return_lse=True)
        assert lse.shape == shape and out.shape == (*shape, 8)


@pytest.mark.quick
def test_key_lengths_beyond_four_dimensions():
    q, k = torch.randn(2, 3, 4, 5, 8), torch.randn(2, 3, 4, 9, 8)
    lengths = torch.tensor([[9, 0, 4], [1, 2, 3]])
    out = tf.scaled_dot_product_attention(q, k, k, key_lengths=lengths)
    flat = tf.scaled_dot_product_attention(
        q.flatten(0, 1), k.flatten(0, 1), k.flatten(0, 1), key_lengths=lengths.flatten()
    )
    assert torch.equal(out, flat.view(out.shape))


@pytest.mark.quick
def test_dropping_everything():
    x = torch.randn(2, 3, 5, 8, requires_grad=True)
    rows = torch.randn(4, 8, requires_grad=True)
    ids, table = torch.tensor([1, 2]), torch.randn(5, 8, requires_grad=True)
    qkv = torch.randn(2, 5, 3, 2, 8, requires_grad=True)
    for out, t in (
        (tf.scaled_dot_product_attention(x, x, x, dropout_p=1.0), x),
        (tf.ops.qkv_attention(qkv, dropout_p=1.0), qkv),
        (tf.dropout(rows, 1.0), rows),
        (tf.embedding_layer_norm(ids, table, dropout_p=1.0), table),
    ):
        assert out.shape[-1] == 8 and not out.any() and not torch.autograd.grad(out.sum(), t)[0].any()
    out = tf.add_layer_norm(rows, rows.detach() + 1, dropout_p=1.0)[1]
    assert torch.equal(out, rows.detach() + 1) and not torch.autograd.grad(out.sum(), rows)[0].any()


@pytest.mark.quick
@pytest.mark.parametrize("far", [2**31, 2**62, 2**63 - 1])
def test_windows_beyond_every_position(far):
    q, k = torch.randn(1, 2, 70, 16), torch.randn(1, 2, 300, 16)
    for queries in (q, q[:, :, :3]):  # the kernel for many queries and the one for few
        for window, same in (((far, far), None), ((5, far), (5, None)), ((far, 5), (None, 5))):
            for alignment in ("top_left", "bottom_right"):
                more = {"causal_alignment": alignment}
                found = tf.scaled_dot_product_attention(queries, k, k, window=window, **more)
                assert torch.equal(found, tf.scaled_dot_product_attention(queries, k, k, window=same, **more))
    spec = (q, k, k, None, None, None, None, None, 70, 300, None, 0, False, None, 0.25, 1, far, far, 0.0, 0.0)
    out = torch.ops.transformer_fast.attention(*spec)[0]  # the registered op has no input checks
    assert torch.equal(out, tf.scaled_dot_product_attention(q, k, k, scale=0.25, window=(far, far)))


def test_few_keys_are_as_exact_as_dot_products():
    """For few rows libraries compute dot products with parallel partial sums, which lose less than one long sum."""
    triples = []
    for seed in range(30):
        torch.manual_seed(seed)
        tensors = [torch.randn(s) for s in ((1, 35, 65), (1, 7, 65), (1, 7, 15))]
        found = tf.scaled_dot_product_attention(*tensors, scale=0.3)
        truth, same = _plain(*[t.double() for t in tensors], scale=0.3), _plain(*tensors, scale=0.3)
        assert_as_accurate(found, truth, same, name=f"seed {seed}")
        triples.append([(t.double() - truth).flatten() for t in (found, same)])
    ours, theirs = (torch.cat(errors).norm() for errors in zip(*triples))
    assert ours <= 1.25 * theirs  # 1.4 with sums of 64 products each


def test_probabilities_of_strided_keys_are_as_exact_as_dot_products():
    """One query, and keys whose heads are not adjacent. A product with a copy of transposed keys would lose digits."""
    torch.manual_seed(0)
    q, k = torch.randn(40, 2, 1, 256) * 4, torch.randn(40, 2, 40, 256)[:, :, :31]
    truth, same = (
        torch.softmax(torch.einsum("bhqd,bhkd->bhqk", a, b) / 16, -1)
        for a, b in ((q.double(), k.double()), (q, k.contiguous()))
    )
    lse = tf.scaled_dot_product_attention(q, k, k, return_lse=True)[1]
    assert_as_accurate(tf.attention_probabilities(q, k, lse), truth, same)
