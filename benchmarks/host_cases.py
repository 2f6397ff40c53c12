"""The time of a call on tensors so small that a GPU waits for the CPU: what every op of a model costs in eager mode."""

from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import transformer_fast as tf

from .calls import cuda_candidate, forward_only, with_gradients
from .case import OURS, Bar, Candidate, Case

__all__ = ["host_cases"]

TORCH = "torch"
# {op: (shape, number of such tensors, number of vectors of its width, ours, torch's)}
OPS: dict[str, tuple[tuple[int, ...], int, int, Callable, Callable]] = {
    "layer-norm": (
        (64, 768), 1, 2, lambda x, w, b: tf.layer_norm(x, (x.shape[-1],), w, b),
        lambda x, w, b: F.layer_norm(x, (x.shape[-1],), w, b),
    ),
    "add-layer-norm": (
        (64, 768), 2, 2, lambda x, r, w, b: tf.add_layer_norm(x, r, w, b, return_sum=False),
        lambda x, r, w, b: F.layer_norm(x + r, (x.shape[-1],), w, b),
    ),
    "bias-gelu": ((64, 3072), 1, 1, tf.bias_activation, lambda x, b: F.gelu(x + b)),
    "attention": (
        (1, 12, 64, 64), 3, 0, tf.scaled_dot_product_attention, F.scaled_dot_product_attention,
    ),
}  # fmt: skip


def host_cases(device: str) -> list[Case]:
    return [_host(op, training, device) for op in OPS for training in (False, True)]


def _host(op: str, training: bool, device: str) -> Case:
    shape, same, vectors, ours, theirs = OPS[op]
    wrap, kind = (with_gradients, "training") if training else (forward_only, "inference")

    def inputs(tiny: bool):
        torch.manual_seed(0)
        sizes = [shape] * same + [shape[-1:]] * vectors
        leaves = [torch.randn(s, device=device).bfloat16().requires_grad_(training) for s in sizes]
        return SimpleNamespace(leaves=leaves, upstream=torch.randn(shape, device=device).bfloat16())

    def of(function: Callable) -> Callable:
        return wrap(lambda x: function(*x.leaves))

    return Case(
        name=f"host/bf16-{op}-{kind}",
        title=f"host time of {op.replace('-', ' ')}, {'forward + backward' if training else 'forward'}, {shape}",
        inputs=inputs,
        candidates=(Candidate(OURS, of(ours)), cuda_candidate(of(ours)), Candidate(TORCH, of(theirs))),
        peer=TORCH,
        dtype="bf16",
        shape=f"{shape}",
        bar=Bar(microseconds=50 if training else 20),
        memory=False,
    )
