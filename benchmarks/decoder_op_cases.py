"""Cases of ops in modern decoders: gated activations, and rotary embedding with head norms and the append to a cache.

On a GPU, graphs are replayed.
"""

from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import transformer_fast as tf

from . import shapes
from .calls import cuda_candidate, forward_only, replayed, with_gradients
from .case import OURS, Bar, Candidate, Case

__all__ = ["decoder_op_cases"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TORCH, COMPILE = "torch", "torch.compile"
EPS = 1e-6
# {gated unit: (our activation, torch's)}
GATED = {"swiglu": ("silu", F.silu), "geglu": ("gelu", F.gelu)}


def decoder_op_cases(device: str, dtype: str, gated: list[tuple[int, int]], appended: list[shapes.AppendShape]):
    """dtype: of all cases; gated: (rows, width) of the activations; appended: shapes of the new tokens."""
    cases = [_gated(unit, size, dtype, device) for size in gated for unit in GATED]
    return [*cases, *(_append(shape, dtype, device) for shape in appended)]


def _candidates(wrap: Callable, ours: Callable, theirs: Callable) -> tuple[Candidate, ...]:
    return (
        Candidate(OURS, wrap(ours)),
        cuda_candidate(wrap(ours)),
        Candidate(TORCH, wrap(theirs)),
        Candidate(COMPILE, lambda x: wrap(torch.compile(theirs, dynamic=False))(x), slow=True),
    )


# ---- gated activations -------------------------------------------------------------------------------
def _gated(unit: str, rows_width: tuple[int, int], dtype: str, device: str) -> Case:
    """act(x) * gate, forward and backward: reads and writes eight tensors."""
    rows, width = rows_width
    ours, theirs = GATED[unit]

    def inputs(tiny: bool):
        shape = (4, 64) if tiny else rows_width
        torch.manual_seed(0)
        x, gate, upstream = (torch.randn(shape, device=device).to(DTYPES[dtype]) for _ in range(3))
        return SimpleNamespace(leaves=[x.requires_grad_(), gate.requires_grad_()], upstream=upstream)

    return Case(
        name=f"pointwise/{dtype}-{unit}-{rows}x{width}",
        title=f"{unit} forward + backward {dtype}, {rows_width}",
        inputs=inputs,
        candidates=_candidates(
            replayed(with_gradients, device), lambda x: tf.bias_activation(x.leaves[0], None, ours, gate=x.leaves[1]),
            lambda x: theirs(x.leaves[0]) * x.leaves[1],
        ),
        peer=TORCH,
        dtype=dtype,
        shape=f"{rows_width}",
        bytes=8.0 * rows * width * DTYPES[dtype].itemsize,
        bar=Bar(1.5),
    )  # fmt: skip


# ---- rotation, head norms and the append to a cache ----------------------------------------------------
def _append(shape: shapes.AppendShape, dtype: str, device: str) -> Case:
    """New tokens of every sequence: heads are normalised and rotated, keys and values are appended to the cached
    ones."""
    tokens, rotated = shape.batch * shape.length, shape.heads + shape.key_heads

    def inputs(tiny: bool):
        s = shape._replace(batch=2, length=min(shape.length, 3), cached=5) if tiny else shape
        torch.manual_seed(0)

        def heads(count: int, length: int):
            return torch.randn(s.batch, length, count, s.head_dim, device=device).to(DTYPES[dtype]).transpose(1, 2)

        angles = torch.arange(s.cached + s.length, device=device)[:, None] * 1e6 ** -torch.linspace(
            0, 1, s.head_dim // 2, device=device
        )
        return SimpleNamespace(
            query=heads(s.heads, s.length), key=heads(s.key_heads, s.length), value=heads(s.key_heads, s.length),
            keys=heads(s.key_heads, s.cached + s.length).contiguous(),
            values=heads(s.key_heads, s.cached + s.length).contiguous(),
            lengths=torch.full((s.batch,), s.cached, device=device), cos=angles.cos(), sin=angles.sin(),
            weights=[torch.rand(s.head_dim, device=device).to(DTYPES[dtype]) + 0.5 for _ in range(2)],
        )  # fmt: skip

    def ours(x):
        query = tf.rotary_cache_append(
            x.query, x.key, x.value, x.keys, x.values, x.lengths, x.cos, x.sin, query_weight=x.weights[0],
            key_weight=x.weights[1], eps=EPS,
        )  # fmt: skip
        return query, x.keys, x.values

    def theirs(x):
        length = x.query.shape[2]
        rows = x.lengths[:, None] + torch.arange(length, device=device)
        cos, sin = (torch.cat((t, t), -1)[rows][:, None].to(x.query.dtype) for t in (x.cos, x.sin))

        def placed(t, weight):
            t = F.rms_norm(t, weight.shape, weight, EPS)
            first, second = t.chunk(2, -1)
            return t * cos + torch.cat((-second, first), -1) * sin

        start = x.keys.shape[2] - length
        x.keys[:, :, start:] = placed(x.key, x.weights[1])
        x.values[:, :, start:] = x.value
        return placed(x.query, x.weights[0]), x.keys, x.values

    return Case(
        name=f"rotary-append/{dtype}-{shape.name}",
        title=f"head norms + rotary embedding + cache append {dtype}, {shape.name}",
        inputs=inputs,
        candidates=_candidates(replayed(forward_only, device), ours, theirs),
        peer=TORCH,
        dtype=dtype,
        shape=f"{tuple(shape)}",
        # Per element of queries and keys: squares and their sum, two factors, and three for the rotation.
        flops=7.0 * tokens * rotated * shape.head_dim,
        bytes=2.0 * tokens * (rotated + shape.key_heads) * shape.head_dim * DTYPES[dtype].itemsize,
        bar=Bar(2.0),
        result=lambda output, x: (output[0], *(t[:, :, -x.query.shape[2] :].clone() for t in output[1:])),
    )
