"""Attention calls as data: inputs, the call on any backend, and the comparison with float64."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from numerics import GRADIENT, OUTPUT, assert_as_accurate

import transformer_fast as tf
from transformer_fast.backends import backend

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@dataclass
class Inputs:
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor | None
    table: torch.Tensor | None
    mask: torch.Tensor | None
    grad_out: torch.Tensor
    grad_lse: torch.Tensor


@dataclass
class Case:
    """One attention call. lengths: number of keys of each sequence (padded: key_lengths). *_axes: which of B, H, Sq, Sk
    are not broadcast. unpadded: sequence b has lengths[b] keys and queries - b queries. buckets: number of buckets of a
    T5 bias, 0 for none."""

    batch: int
    heads: int
    key_heads: int
    queries: int
    keys: int
    dim: int
    dtype: torch.dtype = torch.float32
    unpadded: bool = False
    lengths: list[int] | None = None
    is_causal: bool = False
    causal_alignment: str = "top_left"
    window: tuple | None = None
    softcap: float = 0.0
    scale: float | None = None
    dropout_p: float = 0.0
    mask_axes: tuple | None = None
    bias_axes: tuple | None = None
    buckets: int = 0
    bidirectional: bool = True

    def counts(self) -> tuple[list[int], list[int]]:
        keys = self.lengths or [self.keys] * self.batch
        return [max(self.queries - b, 0) for b in range(self.batch)], keys

    def inputs(self) -> Inputs:
        def data(positions, heads):
            if self.unpadded:
                return torch.randn(positions, heads, self.dim).to(self.dtype)
            return torch.randn(self.batch, positions, heads, self.dim).to(self.dtype).transpose(1, 2)

        def broadcast(axes, make):
            full = (self.batch, self.heads, *self.longest())
            return None if axes is None else make(tuple(n if on else 1 for n, on in zip(full, axes)))

        torch.manual_seed(0)
        rows, cols = (sum(n) for n in self.counts()) if self.unpadded else (self.queries, self.keys)
        query = data(rows, self.heads)
        lse = (self.heads, rows) if self.unpadded else (self.batch, self.heads, rows)
        return Inputs(
            query,
            data(cols, self.key_heads),
            data(cols, self.key_heads),
            broadcast(self.bias_axes, lambda shape: torch.randn(shape).to(self.dtype)),
            torch.randn(self.buckets, self.heads).to(self.dtype) if self.buckets else None,
            broadcast(self.mask_axes, lambda shape: torch.rand(shape) > 0.2),
            torch.randn(query.shape).to(self.dtype),
            torch.randn(lse),
        )

    def longest(self) -> tuple[int, int]:
        return tuple(max(n) for n in self.counts()) if self.unpadded else (self.queries, self.keys)

    def forward(self, leaves, mask) -> tuple[torch.Tensor, torch.Tensor]:
        """out and lse. leaves: (query, key, value, bias, table)."""
        q, k, v, bias, table = leaves
        more = {
            "attn_mask": mask, "bias": bias, "is_causal": self.is_causal, "softcap": self.softcap,
            "causal_alignment": self.causal_alignment, "window": self.window, "scale": self.scale,
            "dropout_p": self.dropout_p, "return_lse": True,
        }  # fmt: skip
        if table is not None:
            more["relative_bias"] = tf.RelativeBias(table, 40, self.bidirectional)
        torch.manual_seed(7)  # the same dropout mask in every run
        if self.unpadded:
            cu = [torch.tensor([0, *n]).cumsum(0).int() for n in self.counts()]
            out, lse = tf.varlen_attention(q, k, v, *cu, **more)
        else:
            lengths = None if self.lengths is None else torch.tensor(self.lengths)
            out, lse = tf.scaled_dot_product_attention(q, k, v, key_lengths=lengths, enable_gqa=True, **more)
        return out, lse

    def run(self, inputs: Inputs, name: str, dtype: torch.dtype) -> list[torch.Tensor]:
        """out, lse and all gradients, computed in `dtype` by backend `name`."""
        leaves = [
            None if t is None else t.detach().to(dtype).requires_grad_()
            for t in (inputs.query, inputs.key, inputs.value, inputs.bias, inputs.table)
        ]
        with backend(name):
            out, lse = self.forward(leaves, inputs.mask)
            wanted = [t for t in leaves if t is not None]
            grads = torch.autograd.grad((out, lse), wanted, (inputs.grad_out.to(dtype), inputs.grad_lse.to(lse.dtype)))
        return [out.detach(), lse.detach(), *grads]


def check(case: Case, inputs: Inputs | None = None, name: str = "cpu") -> None:
    """Compare backend `name` with float64."""
    inputs = inputs or case.inputs()
    truth = case.run(inputs, "eager", torch.float64)
    plain = case.run(inputs, "eager", case.dtype)
    ours = case.run(inputs, name, case.dtype)
    names = ["out", "lse", "dq", "dk", "dv"] + ["dbias"] * bool(case.bias_axes) + ["dtable"] * bool(case.buckets)
    for what, *results in zip(names, ours, truth, plain):
        assert_as_accurate(*results, OUTPUT if what in ("out", "lse") else GRADIENT, f"{what} of {case}")


def next_to_one_key(device: str) -> tuple[dict, dict, tuple]:
    """Tensors, keywords and gradients of a call with dropout whose mask leaves each row (almost) only one of 150 keys.
    That key's score has almost no gradient, with and without dropout of its value."""
    tensors = {name: torch.randn(1, 2, n, 32, device=device).bfloat16() for name, n in
               (("query", 24), ("key", 150), ("value", 150))}  # fmt: skip
    away = torch.arange(150, device=device) - 5 * torch.arange(24, device=device)[:, None]
    kw = {"dropout_p": 0.25, "attn_mask": (-12.0 * away.abs()).bfloat16()}
    return tensors, kw, (torch.randn(1, 2, 24, 32, device=device), None)


def draw_case(draw) -> Case:
    """Any combination of features. Sequences are long enough that rows have several keys: with one key per row the
    gradient of the scores is exactly zero in plain PyTorch and rounding noise in any fused backward pass."""
    sampled, chance = st.sampled_from, st.booleans()
    batch, key_heads = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    keys = draw(st.integers(40, 200))
    unpadded = draw(chance)
    axes = st.none() | st.tuples(*[chance] * 2, st.just(True), st.just(True)) | st.just((True, False, False, True))
    lengths = (
        draw(st.lists(st.integers(24, keys) | st.just(0), min_size=batch, max_size=batch)) if draw(chance) else None
    )
    if lengths is not None and not any(lengths):
        lengths[0] = keys
    return Case(
        batch, key_heads * draw(st.integers(1, 3)), key_heads, draw(st.integers(3, 140)), keys,
        draw(sampled([8, 16, 33, 40, 64, 80, 96])), draw(sampled(FLOATS)), unpadded, lengths,
        is_causal=draw(chance), causal_alignment=draw(sampled(["top_left", "bottom_right"])),
        window=draw(sampled([None, None, (60, 30), (None, 40), (80, None)])), softcap=draw(sampled([0.0, 0.0, 10.0])),
        scale=draw(sampled([None, None, 0.3, -0.2])), dropout_p=draw(sampled([0.0, 0.1, 0.4])),
        mask_axes=draw(axes), bias_axes=draw(axes), buckets=draw(sampled([0, 0, 8, 32])), bidirectional=draw(chance),
    )  # fmt: skip


def bias_of(axes: str, dtype: torch.dtype, device: str = "cpu"):
    """A function of (b, h, sq, sk) that makes a random bias. axes: those of "bhmn" that are not broadcast."""

    def make(b, h, sq, sk):
        return torch.randn([n if a in axes else 1 for a, n in zip("bhmn", (b, h, sq, sk))], device=device).to(dtype)

    return make


def draw_features(draw, device: str, queries: tuple[int, int], keys: tuple[int, int], side: tuple[int, int]) -> dict:
    """Sizes and features of a call in 16 bits, without its head dim. queries, keys, side of a window: least and most.
    bias is a function as of bias_of; relative: (table, maximum distance, bidirectional)."""
    torch.manual_seed(0)  # so that the data of each example can be reproduced
    dtype = draw(st.sampled_from((torch.bfloat16, torch.float16)))
    hk, group, b = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    h, sq, sk = hk * group, draw(st.integers(*queries)), draw(st.integers(*keys))
    found = {"dtype": dtype, "b": b, "h": h, "hk": hk, "sq": sq, "sk": sk, "is_causal": draw(st.booleans())}
    if draw(st.booleans()):
        found["causal_alignment"] = "bottom_right"
    # Sorted, because the order of a set differs between runs.
    features = ["bias", "dropout", "lengths", "mask", "relative", "softcap", "window"]
    for name in sorted(draw(st.sets(st.sampled_from(features)))):
        if name == "window":
            limit = st.none() | st.integers(*side)
            found["window"] = draw(limit), draw(limit)
        elif name == "lengths":
            lengths = draw(st.lists(st.integers(0, sk), min_size=b, max_size=b))
            found["key_lengths"] = torch.tensor(lengths, device=device)
        elif name == "mask":
            shape = [draw(st.sampled_from([1, n])) for n in (b, h, sq, sk)]
            found["attn_mask"] = torch.rand(shape, device=device) > 0.4
        elif name == "bias":
            found["bias"] = bias_of(draw(st.sampled_from(["bhmn", "hmn", "bmn", "mn", "bn"])), dtype, device)
        elif name == "relative":
            bidirectional = draw(st.booleans())
            found["relative"] = torch.randn(8, h, device=device), draw(st.integers(5, 40)), bidirectional
        elif name == "softcap":
            found["softcap"] = 3.0
        else:
            found["dropout_p"] = draw(st.sampled_from([0.1, 0.6]))
    return found
