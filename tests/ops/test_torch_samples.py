"""torch.testing's sample inputs for the functions that ours replace: the same result, or a documented refusal."""

import re

import pytest
import torch
import torch.nn.functional as F
from numerics import GRADIENT, OUTPUT, assert_as_accurate
from torch.nn.attention import SDPBackend, sdpa_kernel

import transformer_fast as tf


def _maths(*args, **more):
    """Attention without fused kernels, with the rounding of plain PyTorch."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*args, **more)


# torch's op: (ours, plain PyTorch, a pattern for the errors of what ours refuses)
OPS = {
    "scaled_dot_product_attention": (tf.scaled_dot_product_attention, _maths, None),
    "layer_norm": (tf.layer_norm, F.layer_norm, "^eps: wanted a finite number >= 0"),
    "rms_norm": (tf.rms_norm, F.rms_norm, "^eps: wanted a finite number >= 0"),
    "linear": (tf.linear, F.linear, "^(weight|bias): wanted shape"),
    "gelu": (
        lambda x, approximate="none": tf.bias_activation(x, None, "gelu" if approximate == "none" else "gelu_tanh"),
        F.gelu, "^input: wanted at least one dimension",
    ),
    "relu": (lambda x: tf.bias_activation(x, None, "relu"), F.relu, "^input: wanted at least one dimension"),
    "silu": (lambda x: tf.bias_activation(x, None, "silu"), F.silu, "^input: wanted at least one dimension"),
    "cross_entropy": (tf.cross_entropy, F.cross_entropy, "^input: wanted .*flatten|^target: .*probabilities"),
    "dropout": (tf.dropout, F.dropout, None),
}  # fmt: skip


def _samples(name):
    from torch.testing._internal.common_methods_invocations import op_db

    op = next(o for o in op_db if o.name == f"nn.functional.{name}" and not o.variant_test_name)
    return list(op.sample_inputs("cpu", torch.float32, requires_grad=True))


def _run(function, sample, dtype):
    def cast(t):
        if not isinstance(t, torch.Tensor) or not t.is_floating_point():
            return t
        return t.detach().to(dtype).requires_grad_(t.requires_grad)

    args, more = [cast(t) for t in (sample.input, *sample.args)], {k: cast(v) for k, v in sample.kwargs.items()}
    out = function(*args, **more)
    leaves = [t for t in (*args, *more.values()) if isinstance(t, torch.Tensor) and t.requires_grad]
    if not out.requires_grad:
        return [out]
    weights = torch.linspace(-1, 1, max(out.numel(), 1), dtype=torch.float64)[: out.numel()].to(dtype).view(out.shape)
    found = torch.autograd.grad((out * weights).sum(), leaves, allow_unused=True)
    return [out.detach(), *(torch.zeros_like(t) if g is None else g for g, t in zip(found, leaves))]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OPS)
def test_samples(name):
    ours, plain, refused = OPS[name]
    ran, errors = 0, {"out": [], "gradients": []}
    for i, sample in enumerate(_samples(name)):
        dropped = sample.kwargs.get("p" if name == "dropout" else "dropout_p", 0.0)
        try:
            found = _run(ours, sample, torch.float32)
        except (TypeError, ValueError) as error:
            assert refused and re.search(refused, str(error)), f"sample {i}: {sample}: {error}"
            continue
        ran += 1
        truth, same = (_run(plain, sample, dtype) for dtype in (torch.float64, torch.float32))
        assert [t.shape for t in found] == [t.shape for t in truth], f"sample {i}: {sample}"
        for k, three in enumerate(zip(found, truth, same)):
            other_mask = 0.0 < dropped < 1.0 and sample.kwargs.get("training", True)
            if three[0].numel() and not other_mask and not three[1].isnan().any():
                largest = three[1].abs().max().item() or 1.0
                errors["gradients" if k else "out"].append([t.flatten() / largest for t in three])
    assert ran >= 2
    for kind, triples in errors.items():  # pooled, because a single error of few numbers depends on chance
        if triples:
            assert_as_accurate(
                *(torch.cat(t) for t in zip(*triples)), GRADIENT if kind == "gradients" else OUTPUT, kind
            )
