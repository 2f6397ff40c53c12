"""Ops called several times with other data, as backends/remembered.py launches them."""

import gc

import torch
from numerics import GRADIENT, OUTPUT, assert_as_accurate

import transformer_fast as tf

CALLS = {
    "layer_norm": (lambda x, w, b: tf.layer_norm(x, (64,), w, b), ((2, 5, 64), (64,), (64,))),
    "add_rms_norm": (lambda x, r, w: tf.add_rms_norm(x, r, w), ((7, 64), (7, 64), (64,))),
    "dropped": (lambda x, r, w, b: tf.add_layer_norm(x, r, w, b, dropout_p=0.3), ((7, 64), (7, 64), (64,), (64,))),
    "biased": (lambda x, b: tf.bias_activation(x, b, "silu"), ((2, 5, 64), (64,))),
    "gated": (lambda x, g: tf.bias_activation(x, gate=g), ((7, 64), (7, 64))),
    "qkv": (lambda qkv: tf.ops.qkv_attention(qkv, None, None, 0.2, True), ((2, 40, 3, 4, 64),)),
    "unpadded": (lambda qkv: tf.ops.qkv_attention(qkv, _offsets(qkv), 40, 0.2), ((90, 3, 4, 64),)),
    "attention": (
        lambda q, k, v: tf.scaled_dot_product_attention(
            *(t.transpose(1, 2) for t in (q, k, v)), is_causal=True, enable_gqa=True
        ),
        ((2, 40, 4, 64), *[(2, 40, 2, 64)] * 2),
    ),
}


def _offsets(t: torch.Tensor) -> torch.Tensor:
    return torch.tensor([0, 30, 70, 90], dtype=torch.int32, device=t.device)


def _attention(*heads: torch.Tensor) -> torch.Tensor:
    q, k, v = (t.transpose(1, 2) for t in heads)
    return tf.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def results(name: str, tensors, backend: str, gradients: bool) -> tuple[list[torch.Tensor], ...]:
    """Outputs and gradients."""
    leaves = [t.clone().requires_grad_(gradients) for t in tensors]
    torch.manual_seed(5)  # of dropout
    with tf.backend(backend):
        out = CALLS[name][0](*leaves)
        outs = list(out) if isinstance(out, tuple) else [out]
        if not gradients:
            return outs, []
        upstream = [torch.linspace(0.5, 2.5, o.numel(), device=o.device).to(o.dtype).view(o.shape) for o in outs]
        return [o.detach() for o in outs], list(torch.autograd.grad(outs, leaves, upstream))


def check_repeats(device: str, name: str, backend: str, dtype: torch.dtype, gradients: bool) -> None:
    before = _tensors()
    random = torch.Generator().manual_seed(0)
    for _ in range(3):
        _check(device, name, backend, dtype, gradients, random)
    assert _tensors() <= before, "what is remembered keeps tensors"


def _check(device: str, name: str, backend: str, dtype: torch.dtype, gradients: bool, random) -> None:
    tensors = [torch.randn(shape, generator=random).to(device, dtype) for shape in CALLS[name][1]]
    actual = results(name, tensors, backend, gradients)
    plain = results(name, tensors, "eager", gradients)
    truth = results(name, [t.double() for t in tensors], "eager", gradients)
    for a, t, e, factor in zip(actual, truth, plain, (OUTPUT, GRADIENT)):
        for mine, true, theirs in zip(a, t, e, strict=True):
            assert_as_accurate(mine, true, theirs, factor, name)


def _tensors() -> int:
    """How many tensors there are."""
    gc.collect()
    return sum(type(t) is torch.Tensor for t in gc.get_objects())
