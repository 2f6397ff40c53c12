"""layers.MultiheadAttention computes the same as torch.nn.MultiheadAttention."""

import pytest
import torch
from numerics import GRADIENT, assert_as_accurate
from torch import nn

from transformer_fast import MultiheadAttention

OPTIONS = [
    {},
    {"batch_first": True},
    {"batch_first": True, "bias": False},
    {"batch_first": True, "kdim": 10, "vdim": 6},
    {"batch_first": True, "add_bias_kv": True},
    {"batch_first": True, "add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True, "kdim": 10, "vdim": 6},
]


MASKS = ["padding", "float padding", "pairs", "pairs per head", "float pairs", "both", "causal"]


def make(dtype=torch.float32, **options):
    """(ours, torch's, torch's in float64) with the same weights."""
    theirs = nn.MultiheadAttention(24, 3, **options)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.to(dtype)
    ours, truth = MultiheadAttention(24, 3, **options).to(dtype), nn.MultiheadAttention(24, 3, **options).double()
    for other in (ours, truth):
        other.load_state_dict(theirs.state_dict(), strict=True)
    return ours.eval(), theirs.eval(), truth.eval()


def inputs(options, dtype, same: bool):
    shape = (4, 9) if options.get("batch_first") else (9, 4)
    query = torch.randn(*shape, 24, dtype=dtype)
    if same:
        return query, query, query
    other = (4, 7) if options.get("batch_first") else (7, 4)
    return (
        query,
        torch.randn(*other, options.get("kdim", 24), dtype=dtype),
        torch.randn(*other, options.get("vdim", 24), dtype=dtype),
    )


def run(model, tensors, backward=True, **call):
    dtype = next(model.parameters()).dtype
    copies: dict[int, torch.Tensor] = {}
    for t in tensors:
        copies.setdefault(id(t), t.detach().to(dtype).requires_grad_())
    call = {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in call.items()}
    out, weights = model(*(copies[id(t)] for t in tensors), **call)
    out.square().sum().backward()
    gradients = [c.grad for c in copies.values()] + [
        torch.cat([p.grad.flatten() for p in model.parameters()])
    ]  # the gradient of key biases is only rounding, so they are compared with the rest
    return out.detach(), weights, gradients


def compare(results):
    ours, theirs, truth = results
    assert_as_accurate(ours[0], truth[0], theirs[0])
    assert (ours[1] is None) == (theirs[1] is None)
    if ours[1] is not None:
        assert_as_accurate(ours[1], truth[1], theirs[1], name="weights")
    for a, b, c in zip(ours[2], theirs[2], truth[2]):
        assert_as_accurate(a, c, b, GRADIENT)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_like_torch(options, weights, dtype):
    models = make(dtype, **options)
    for same in (False,) if "kdim" in options else (False, True):
        tensors = inputs(options, dtype, same)
        compare([run(m, tensors, need_weights=weights) for m in models])


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize(
    "kind", ["padding", "float padding", "pairs", "pairs per head", "float pairs", "both", "causal"]
)
def test_masks(kind, extra):
    models = make(batch_first=True, add_bias_kv=extra)
    tensors = inputs({"batch_first": True}, torch.float32, True)
    call = {}
    if "padding" in kind or kind == "both":
        padding = torch.arange(9) >= torch.tensor([9, 4, 1, 7])[:, None]
        call["key_padding_mask"] = padding.float() * -2 if kind == "float padding" else padding
    if "pairs" in kind or kind == "both":
        shape = (12, 9, 9) if kind == "pairs per head" else (9, 9)
        pairs = (torch.rand(shape) < 0.4) & ~torch.eye(9, dtype=torch.bool)
        pairs[..., 0] = False
        call["attn_mask"] = torch.randn(shape) if kind == "float pairs" else pairs
    if kind == "causal":
        causal = torch.ones(9, 9, dtype=torch.bool).triu(1)
        call = {"attn_mask": causal, "is_causal": True}
        ours = run(models[0], tensors, is_causal=True)
        assert_as_accurate(ours[0], run(models[2], tensors, **call)[0], run(models[1], tensors, **call)[0])
    compare([run(m, tensors, average_attn_weights=False, **call) for m in models])


def test_without_a_batch():
    ours, theirs, truth = make()
    x = torch.randn(9, 24)
    padding = torch.arange(9) > 5
    results = [m(*[x.to(m.in_proj_weight.dtype)] * 3, key_padding_mask=padding) for m in (ours, truth, theirs)]
    assert_as_accurate(*(r[0] for r in results))
    assert_as_accurate(*(r[1] for r in results))


def test_nothing_to_attend_to_gives_the_output_bias():
    model = make(batch_first=True)[0]
    x = torch.randn(2, 5, 24)
    padding = torch.tensor([[False] * 5, [True] * 5])
    out, weights = model(x, x, x, key_padding_mask=padding)
    assert torch.equal(out[1], model.out_proj.bias.expand(5, 24)) and weights[1].eq(0).all()


def test_dropout_in_training_alone():
    model = MultiheadAttention(24, 3, dropout=0.5, batch_first=True)
    x = torch.randn(2, 5, 24)
    assert not torch.equal(model(x, x, x, need_weights=False)[0], model(x, x, x, need_weights=False)[0])
    model.eval()
    assert torch.equal(model(x, x, x, need_weights=False)[0], model(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize(
    "tensors, call, message",
    [
        (((2, 5, 24), (5, 24), (5, 24)), {}, "all 3 dimensions, or all 2"),
        (((2, 5, 20), (2, 5, 24), (2, 5, 24)), {}, "query: wanted width 24"),
        (((2, 5, 24), (2, 5, 24), (2, 5, 20)), {}, "value: wanted width 24"),
        (((2, 5, 24),) * 3, {"attn_mask": torch.ones(5, 4)}, r"attn_mask: wanted shape \(5, 5\)"),
        (((2, 5, 24),) * 3, {"key_padding_mask": torch.ones(5, 2)}, r"key_padding_mask: wanted shape \(B, Sk\)"),
    ],
)
def test_bad_input(tensors, call, message):
    model = MultiheadAttention(24, 3, batch_first=True)
    with pytest.raises(ValueError, match=message):
        model(*(torch.randn(s) for s in tensors), **call)


def test_integer_masks():
    x = torch.randn(2, 5, 24)
    with pytest.raises(TypeError, match="attn_mask: wanted bool or a float dtype"):
        MultiheadAttention(24, 3, batch_first=True)(x, x, x, attn_mask=torch.ones(5, 5, dtype=torch.int))
