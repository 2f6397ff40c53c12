"""Norms and activations called several times with other data, as backends/remembered.py launches them."""

import torch
from numerics import GRADIENT, OUTPUT, assert_as_accurate

import transformer_fast as tf

CALLS = {
    "layer_norm": (lambda x, w, b: tf.layer_norm(x, (64,), w, b), ((2, 5, 64), (64,), (64,))),
    "add_rms_norm": (lambda x, r, w: tf.add_rms_norm(x, r, w), ((7, 64), (7, 64), (64,))),
    "biased": (lambda x, b: tf.bias_activation(x, b, "silu"), ((2, 5, 64), (64,))),
    "gated": (lambda x, g: tf.bias_activation(x, gate=g), ((7, 64), (7, 64))),
}


def results(name: str, tensors, backend: str, gradients: bool) -> list[torch.Tensor]:
    leaves = [t.clone().requires_grad_(gradients) for t in tensors]
    with tf.backend(backend):
        out = CALLS[name][0](*leaves)
        outs = list(out) if isinstance(out, tuple) else [out]
        if not gradients:
            return outs
        upstream = [torch.ones_like(o) * (i + 1.5) for i, o in enumerate(outs)]
        return [*(o.detach() for o in outs), *torch.autograd.grad(outs, leaves, upstream)]


def check_repeats(device: str, name: str, backend: str, dtype: torch.dtype, gradients: bool) -> None:
    torch.manual_seed(0)
    for _ in range(3):
        tensors = [torch.randn(shape, device=device) for shape in CALLS[name][1]]
        mine = [t.to(dtype) for t in tensors]
        actual = results(name, mine, backend, gradients)
        plain = results(name, mine, "eager", gradients)
        truth = results(name, [t.double() for t in mine], "eager", gradients)
        for i, (a, t, e) in enumerate(zip(actual, truth, plain, strict=True)):
            assert_as_accurate(a, t, e, OUTPUT if a.shape == truth[0].shape and i < 2 else GRADIENT, name)
