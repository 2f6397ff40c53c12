"""The encoder stack against plain PyTorch, for every TransformerSpec; unpadding and padding again."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import GRADIENT, assert_as_accurate
from torch import nn

from transformer_fast.layers import (
    LayerWeights,
    SlotTable,
    TransformerSpec,
    Unpadding,
    plan_call,
    plan_unpadding,
    run_layers,
    transformer_layer,
)

WIDTH, HEADS = 24, 3


class Layer(nn.Module):
    def __init__(self, spec: TransformerSpec, norm=nn.LayerNorm):
        super().__init__()
        self.spec = spec
        self.query, self.key, self.value, self.attention_output = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)
        self.attention_norm, self.output_norm = norm(WIDTH, eps=1e-5), norm(WIDTH, eps=1e-5)
        if spec.gated:
            self.gate = nn.Linear(WIDTH, 40, bias=False)
        if spec.activation is None:
            self.activation_fn = nn.Softplus()

    def forward(self, x, call, index, first_only=False, past_key_values=None):
        return transformer_layer(TABLE.read(self), x, call, index, first_only, past_key_values)

    def plain(self, x, allowed):
        """The layer in plain PyTorch. allowed: (B, 1, S, S) bool."""
        pre = self.spec.norm_position == "pre"
        y = self.attention_norm(x) if pre else x
        q, k, v = (m(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for m in (self.query, self.key, self.value))
        scores = q @ k.transpose(-1, -2) * (self.spec.scale or (WIDTH // HEADS) ** -0.5)
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0.0)
        x = x + self.attention_output((weights @ v).transpose(1, 2).flatten(-2))
        x = x if pre else self.attention_norm(x)
        y = self.output_norm(x) if pre else x
        act = {"gelu": nn.functional.gelu, "relu": nn.functional.relu, "silu": nn.functional.silu}
        inner = act.get(self.spec.activation, nn.functional.softplus)(self.up(y))
        inner = inner * self.gate(y) if self.spec.gated else inner
        x = x + self.down(inner)
        return x if pre else self.output_norm(x)


TABLE = SlotTable(**{slot: slot for slot in LayerWeights._fields})
SPECS = {
    "bert": {},
    "pre-norm": {"norm_position": "pre", "activation": "relu"},
    "gated": {"norm_position": "pre", "activation": "silu", "gated": True, "scale": 1.0},
    "gated, unnamed activation": {"activation": None, "gated": True},
    "causal": {"causal": True, "activation": None},
}


def reference(layers, x, mask, causal):
    allowed = mask[:, None, None] & torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
    if causal:
        allowed = allowed & torch.ones_like(allowed).tril()
    for layer in layers:
        x = layer.plain(x, allowed)
    return x


def double(layers):
    copies = []
    for layer in layers:
        copy = Layer(layer.spec, type(layer.output_norm)).double()
        copy.load_state_dict(layer.state_dict())
        copies.append(copy)
    return copies


@pytest.mark.quick
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("first_only", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_every_spec(name, padded, first_only, norm):
    spec = TransformerSpec(num_heads=HEADS, head_dim=WIDTH // HEADS, **SPECS[name])
    layers = [Layer(spec, norm) for _ in range(2)]
    mask = torch.ones(4, 7, dtype=torch.bool)
    if padded:
        mask &= torch.arange(7) < torch.tensor([7, 3, 1, 5])[:, None]
    x = torch.randn(4, 7, WIDTH)
    results = []
    for kind, stack in (("ours", layers), ("plain", layers), ("truth", double(layers))):
        given_x = x.to(stack[0].up.weight.dtype).requires_grad_()
        if kind == "ours":
            call = plan_call(spec, mask if padded else None, 4, 7, x.device)
            rows = run_layers(stack, call.unpadding.unpad(given_x), call, first_only=first_only)
            out = rows if first_only else call.unpadding.pad(rows)
        else:
            out = reference(stack, given_x, mask, spec.causal)
            out = out[:, 0] if first_only else out * mask[..., None]
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        gradient = torch.autograd.grad((out * weights).sum(), [given_x, *stack[0].query.parameters()])
        results.append((out, gradient))
    ours, plain, truth = results
    assert_as_accurate(ours[0], truth[0], plain[0])
    for a, b, c in zip(ours[1], plain[1], truth[1]):
        assert_as_accurate(a, c, b, GRADIENT)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_unpadding_there_and_back(data):
    batch, length = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 6))
    bits = st.lists(st.booleans(), min_size=batch * length, max_size=batch * length)
    mask = torch.tensor(data.draw(bits), dtype=torch.bool).view(batch, length)
    read = torch.tensor(data.draw(bits), dtype=torch.bool).view(batch, length) if data.draw(st.booleans()) else None
    first = data.draw(st.booleans())
    unpadding = plan_unpadding(mask, read, first)
    keep = mask if read is None else mask | read
    if first:
        keep = keep | (torch.arange(length) == 0)
    x = torch.randn(batch, length, 3)
    rows = unpadding.unpad(x)
    assert torch.equal(unpadding.pad(rows), x * keep[..., None])
    if unpadding.index is None:
        assert keep.all()
        real = mask[:, None, None] if unpadding.key_mask is not None else None
        assert real is None or torch.equal(unpadding.key_mask, real)
    else:
        assert torch.equal(rows, x[keep])
        lengths = keep.sum(1)
        assert unpadding.cu_seqlens.tolist() == [0, *lengths.cumsum(0).tolist()]
        assert unpadding.max_seqlen == int(lengths.max())
        for b in range(batch):
            attended = mask[b][keep[b]]
            assert unpadding.key_mask is None or torch.equal(unpadding.key_mask[b, 0, 0, : lengths[b]], attended)
    assert (unpadding.key_mask is not None) == bool((keep & ~mask).any())
    if first and batch and length:
        assert torch.equal(unpadding.first(rows), x[:, 0])


def test_fill_of_dropped_positions():
    unpadding = plan_unpadding(torch.tensor([[True, False], [True, True]]))
    assert unpadding.pad(torch.ones(3, 1), fill=-5).flatten().tolist() == [1, -5, 1, 1]
    assert Unpadding(1, 2).pad(torch.ones(1, 2, 1), fill=-5).flatten().tolist() == [1, 1]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: TransformerSpec(2, 4, norm_position="middle"), "norm_position: wanted 'post' or 'pre'"),
        (lambda: SlotTable(query="q"), "missing .*'down'"),
        (lambda: SlotTable(**{slot: slot for slot in LayerWeights._fields}, other="x"), "unknown .'other'."),
    ],
)
def test_bad_specs(make, message):
    with pytest.raises(ValueError, match=message):
        make()
