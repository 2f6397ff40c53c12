"""Beyond one backward pass: gradients of gradients, forward mode, torch.func, and in-place writes."""

import pytest
import torch
import torch.nn.functional as F
from numerics import GRADIENT, assert_as_accurate
from torch.autograd import forward_ad

import transformer_fast as tf

CU = torch.tensor([0, 3, 7], dtype=torch.int32)
IDS, TARGET = torch.tensor([[3, 0, 3], [5, 1, 0]]), torch.tensor([1, -100, 0, 5])


def _sdpa(q, k, v, is_causal=True):
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return scores.softmax(-1) @ v


def _varlen(q, k, v):
    parts = [[t[a:b].transpose(0, 1) for t in (q, k, v)] for a, b in ((0, 3), (3, 7))]
    return torch.cat([_sdpa(*part, is_causal=False).transpose(0, 1) for part in parts])


def _qkv(x):
    return _sdpa(*x.permute(2, 0, 3, 1, 4), is_causal=False).transpose(1, 2)


def _tied(x):
    return _sdpa(x, x, x)


# name: (ours, plain PyTorch, shapes of the arguments)
OPS = {
    "attention": (lambda q, k, v: tf.scaled_dot_product_attention(q, k, v, is_causal=True), _sdpa, [(2, 2, 5, 8)] * 3),
    "one tensor thrice": (lambda x: tf.scaled_dot_product_attention(x, x, x, is_causal=True), _tied, [(2, 2, 5, 8)]),
    "varlen": (lambda q, k, v: tf.varlen_attention(q, k, v, CU), _varlen, [(7, 2, 8)] * 3),
    "qkv": (tf.ops.qkv_attention, _qkv, [(2, 5, 3, 2, 8)]),
    "layer_norm": (
        lambda x, w, b: tf.layer_norm(x, (8,), w, b), lambda x, w, b: F.layer_norm(x, (8,), w, b), [(4, 8), (8,), (8,)],
    ),
    "rms_norm": (lambda x, w: tf.rms_norm(x, (8,), w), lambda x, w: F.rms_norm(x, (8,), w), [(4, 8), (8,)]),
    "add_layer_norm": (
        lambda x, r, w, b: sum(tf.add_layer_norm(x, r, w, b)),
        lambda x, r, w, b: F.layer_norm(x + r, (8,), w, b) + (x + r),
        [(4, 8), (4, 8), (8,), (8,)],
    ),
    "bias_activation": (tf.bias_activation, lambda x, b: F.gelu(x + b), [(4, 8), (8,)]),
    "gated": (
        lambda x, g: tf.bias_activation(x, None, "silu", gate=g), lambda x, g: F.silu(x) * g, [(4, 8), (4, 8)],
    ),
    "linear": (
        lambda x, w, b: tf.linear(x, w, b, "gelu"), lambda x, w, b: F.gelu(F.linear(x, w, b)), [(4, 8), (6, 8), (6,)],
    ),
    "linear, long": (tf.linear, F.linear, [(1100, 8), (30, 8), (30,)]),
    "cross_entropy": (
        lambda x: tf.cross_entropy(x, TARGET, label_smoothing=0.1, z_loss=0.1),
        lambda x: F.cross_entropy(x, TARGET, label_smoothing=0.1)
        + 0.1 * x[TARGET >= 0].logsumexp(-1).square().mean(),
        [(4, 6)],
    ),
    "linear_cross_entropy": (
        lambda x, w, b: tf.linear_cross_entropy(x, w, TARGET, b, reduction="sum"),
        lambda x, w, b: F.cross_entropy(F.linear(x, w, b), TARGET, reduction="sum"),
        [(4, 8), (6, 8), (6,)],
    ),
    "embedding_layer_norm": (
        lambda e, p, w, b: tf.embedding_layer_norm(IDS, e, torch.arange(3), p, None, None, w, b),
        lambda e, p, w, b: F.layer_norm(F.embedding(IDS, e) + p[:3], (8,), w, b, 1e-12),
        [(6, 8), (4, 8), (8,), (8,)],
    ),
    "projections, tied": (
        lambda x, w: torch.cat(tf.projections(x, [w, w])), lambda x, w: F.linear(x, w).repeat(2, 1), [(4, 8), (6, 8)],
    ),
}  # fmt: skip


def _arguments(shapes, dtype):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def _with_penalty(function, shapes, dtype):
    """Gradients of a loss plus the squared norm of its first gradients."""
    inputs = _arguments(shapes, dtype)
    out = function(*inputs)
    out = out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    first = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
    return torch.autograd.grad(out.sum() + sum(g.square().sum() for g in first), inputs)


@pytest.mark.quick
@pytest.mark.parametrize("name", OPS)
def test_gradients_of_gradients(name):
    ours, plain, shapes = OPS[name]
    found = _with_penalty(ours, shapes, torch.float32)
    truth, same = (_with_penalty(plain, shapes, dtype) for dtype in (torch.float64, torch.float32))
    for i, triple in enumerate(zip(found, truth, same)):
        assert_as_accurate(*triple, GRADIENT, f"argument {i}")


@pytest.mark.parametrize("name", OPS)
def test_forward_mode(name):
    ours, plain, shapes = OPS[name]

    def tangent(function, dtype):
        inputs = [t.detach() for t in _arguments(shapes, dtype)]
        with forward_ad.dual_level():
            out = function(*[forward_ad.make_dual(t, t.cos()) for t in inputs])
            return forward_ad.unpack_dual(out).tangent

    truth, same = (tangent(plain, dtype) for dtype in (torch.float64, torch.float32))
    assert_as_accurate(tangent(ours, torch.float32), truth, same, GRADIENT)


@pytest.mark.parametrize("name", OPS)
def test_per_sample_gradients(name):
    ours, plain, shapes = OPS[name]

    def gradients(function, dtype):
        inputs = [torch.stack([t.detach(), 2 * t.detach()]) for t in _arguments(shapes, dtype)]
        return torch.func.vmap(torch.func.grad(lambda *t: function(*t).square().sum()))(*inputs)

    truth, same = (gradients(plain, dtype) for dtype in (torch.float64, torch.float32))
    assert_as_accurate(gradients(ours, torch.float32), truth, same, GRADIENT)


@pytest.mark.parametrize("name", OPS)
def test_batched_gradients(name):
    """is_grads_batched and vectorized jacobians: one gradient for each of several output gradients."""
    ours, plain, shapes = OPS[name]

    def gradients(function, dtype):
        inputs = _arguments(shapes, dtype)
        out = function(*inputs)
        batch = torch.randn(3, *out.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
        return torch.autograd.grad(out, inputs, batch, is_grads_batched=True)

    truth, same = (gradients(plain, dtype) for dtype in (torch.float64, torch.float32))
    for i, triple in enumerate(zip(gradients(ours, torch.float32), truth, same)):
        assert_as_accurate(*triple, GRADIENT, f"argument {i}")


@pytest.mark.parametrize("op", [tf.lstm, tf.gru])
def test_batched_gradients_of_recurrences(op):
    gates = 4 if op is tf.lstm else 3
    inputs = _arguments([(2, 5, 8), (gates * 3, 8), (gates * 3, 3), (gates * 3,), (gates * 3,)], torch.float32)
    out = op(*inputs)[0]
    batch = torch.randn(3, *out.shape)
    together = torch.autograd.grad(out, inputs, batch, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(out, inputs, grad, retain_graph=True) for grad in batch]
    for found, *wanted in zip(together, *one_by_one):
        torch.testing.assert_close(found, torch.stack(wanted))


def test_nothing_is_written_to_caches_under_a_transform():
    q, cache = torch.randn(2, 2, 4, 1, 8), torch.zeros(2, 4, 6, 8)
    with pytest.raises(RuntimeError, match="kv_cache_attention writes to its caches"):
        torch.func.vmap(lambda q: tf.kv_cache_attention(q, q, q, cache, cache, torch.tensor([1, 2])))(q)
    used, angles = torch.tensor([1, 2]), torch.ones(6, 4)
    with pytest.raises(RuntimeError, match="rotary_cache_append writes to its caches"):
        torch.func.vmap(lambda q: tf.rotary_cache_append(q, q, q, cache, cache, used, angles, angles))(q)


def test_batched_gradients_where_the_loss_overwrites_its_logits():
    x = torch.randn(4, 6, requires_grad=True)
    losses = tf.cross_entropy(x * 2, TARGET, reduction="none", inplace_gradient=True)
    (found,) = torch.autograd.grad(losses, x, torch.eye(4), is_grads_batched=True)
    (whole,) = torch.autograd.grad(F.cross_entropy(x * 2, TARGET, reduction="sum"), x)
    torch.testing.assert_close(found.sum(0), whole)


def test_dropout_is_the_same_mask_in_gradients_of_gradients():
    x, r = _arguments([(6, 64), (6, 64)], torch.float32)
    torch.manual_seed(3)
    y, total = tf.add_layer_norm(x, r, dropout_p=0.3)
    kept = (total - r).detach().abs() > 0
    (first,) = torch.autograd.grad((y * r.detach()).sum(), x, create_graph=True)
    assert torch.equal(first != 0, kept)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    assert torch.equal(second != 0, kept)


@pytest.mark.parametrize("shape", [(4, 8), (2, 3, 8)])
def test_a_linear_output_may_be_changed_in_place(shape):
    x, w, b = _arguments([shape, (6, 8), (6,)], torch.float32)
    found = torch.autograd.grad(tf.linear(x, w, b).mul_(3).relu_().square().sum(), (x, w, b))
    wide = [t.detach().double().requires_grad_() for t in (x, w, b)]
    truth = torch.autograd.grad((3 * F.linear(*wide).relu()).square().sum(), wide)
    same = torch.autograd.grad((3 * F.linear(x, w, b).relu()).square().sum(), (x, w, b))
    for triple in zip(found, truth, same):
        assert_as_accurate(*triple, GRADIENT)
