"""ops.embedding is F.embedding with a gradient of its own on the CPU."""

import pytest
import torch
import torch.nn.functional as F
from numerics import GRADIENT, assert_as_accurate
from torch import nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding

from transformer_fast import ops
from transformer_fast.backends import native
from transformer_fast.layers import embeddings

pytestmark = pytest.mark.skipif(bool(native.load()), reason=native.load() or "there")


def _gradients(table, ids, grad, padding, lookup):
    table = table.detach().clone().requires_grad_()
    y = lookup(ids, table, padding)
    y.backward(grad.to(y.dtype))
    return y.detach(), table.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("padding", [None, 0, -2])
def test_gradient(dtype, padding):
    torch.manual_seed(0)
    table = torch.randn(50, 65).to(dtype)
    ids = torch.randint(50, (3, 4, 7))
    ids[:, :, :3] = 5  # many rows of one entry
    ids[0, 0, 4:6] = torch.tensor([0, 48])
    strided = torch.randn(65, 7, 4, 3).permute(3, 2, 1, 0)
    for grad in (torch.randn(3, 4, 7, 65), strided, torch.randn(65).expand(3, 4, 7, 65)):
        y, found = _gradients(table, ids, grad, padding, ops.embedding)
        assert torch.equal(y, F.embedding(ids, table))
        _, truth = _gradients(table.double(), ids, grad.to(dtype), padding, F.embedding)
        _, theirs = _gradients(table, ids, grad, padding, F.embedding)
        assert_as_accurate(found, truth, theirs, GRADIENT)
        if padding is not None:
            assert not found[padding].any()


def test_other_ids():
    table = torch.randn(9, 4)
    for ids in (torch.tensor([[3, 3, 8]], dtype=torch.int32), torch.tensor(7), torch.zeros(2, 0, dtype=torch.long)):
        grad = torch.randn(*ids.shape, 4)
        for found, wanted in zip(*(_gradients(table, ids, grad, 8, f) for f in (ops.embedding, F.embedding))):
            assert torch.equal(found, wanted)
    for bad in (torch.tensor([9]), torch.tensor([-1])):
        with pytest.raises(IndexError):
            ops.embedding(bad, table.clone().requires_grad_())
    with pytest.raises((AssertionError, ValueError), match="(?i)padding"):
        ops.embedding(torch.tensor([1]), table.clone().requires_grad_(), 9)


def test_gradients_of_gradients_and_transforms():
    torch.manual_seed(1)
    table, ids = torch.randn(6, 3, requires_grad=True), torch.tensor([1, 4, 1])

    def loss(lookup, t):
        return lookup(ids, t, 4).pow(3).sum()

    found, wanted = (
        torch.autograd.grad(torch.autograd.grad(loss(f, table), table, create_graph=True)[0].pow(2).sum(), table)[0]
        for f in (ops.embedding, F.embedding)
    )
    assert torch.allclose(found, wanted) and wanted.any()
    for transform in (torch.func.grad, torch.func.hessian):
        results = [transform(lambda t, f=f: loss(f, t))(table.detach()) for f in (ops.embedding, F.embedding)]
        assert torch.allclose(*results)
    y = ops.embedding(ids, table)
    many = torch.eye(9).view(9, 3, 3)
    (found,) = torch.autograd.grad(y, table, many, is_grads_batched=True)
    (wanted,) = torch.autograd.grad(F.embedding(ids, table), table, many, is_grads_batched=True)
    assert torch.equal(found, wanted)


class _Own(nn.Embedding):
    def forward(self, input):
        return super().forward(input) + 1


def test_modules_are_looked_up_as_they_say(monkeypatch):
    """Modules that do more than look up rows are called."""
    torch.manual_seed(2)
    used = []
    monkeypatch.setattr(embeddings.ops, "embedding", lambda *a: used.append(1) or ops.token_embedding.embedding(*a))
    ids = torch.tensor([[1, 0, 2]])
    hooked = nn.Embedding(4, 8)
    hooked.register_forward_hook(lambda module, args, out: out * 2)
    for module, own in (
        (nn.Embedding(4, 8, padding_idx=0), True),
        (BartScaledWordEmbedding(4, 8, 0, embed_scale=3.0), True),
        (BartScaledWordEmbedding(4, 8, 0, embed_scale=torch.tensor(3.0)), False),
        (nn.Embedding(4, 8, max_norm=0.5), False),
        (nn.Embedding(4, 8, scale_grad_by_freq=True), False),
        (nn.Embedding(4, 8, sparse=True), False),
        (_Own(4, 8), False),
        (hooked, False),
    ):
        used.clear()
        results = []
        for call in (lambda m=module: m(ids), lambda m=module: embeddings.look_up(m, ids)):
            module.weight.grad = None
            y = call()
            y.square().sum().backward()
            results.append((y.detach(), module.weight.grad))
        assert bool(used) == own
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(*(g.to_dense() for _, g in results))
