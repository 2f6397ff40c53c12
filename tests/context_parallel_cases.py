"""Attention calls under context_parallel: each runs in all processes, and the parts are put together again."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

import transformer_fast as tf

BATCH, LENGTH, DIM = 2, 32, 8


@dataclass(frozen=True)
class Case:
    """One call of scaled_dot_product_attention, or of varlen_attention if `unpadded` has the sequences' lengths."""

    name: str
    heads: int = 4
    key_heads: int = 4
    keys: int = LENGTH
    dtype: torch.dtype = torch.float32
    unpadded: tuple[int, ...] = ()
    load_balance: bool = True
    causal: bool = False
    window: tuple | None = None
    softcap: float = 0.0
    lengths: tuple[int, ...] = ()
    key_mask: bool = False
    key_bias: bool = False  # without a gradient
    mask: bool = False  # with the columns of all processes
    bias: bool = False
    buckets: int = 0
    max_distance: int = 6
    refused_by: tuple[str, ...] = ()

    def tensors(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(7)

        def data(*shape):
            return torch.randn(shape, generator=generator).to(self.dtype)

        rows = (sum(self.unpadded),) if self.unpadded else (BATCH, self.heads, LENGTH)
        q = data(rows[0], self.heads, DIM) if self.unpadded else data(*rows, DIM)
        shape = (rows[0], self.key_heads, DIM) if self.unpadded else (BATCH, self.key_heads, self.keys, DIM)
        found = {"query": q, "key": data(*shape), "value": data(*shape), "grad_out": data(*q.shape)}
        found["grad_lse"] = torch.randn((self.heads, rows[0]) if self.unpadded else rows, generator=generator)
        if self.key_mask:
            found["attn_mask"] = torch.rand(BATCH, 1, 1, self.keys, generator=generator) > 0.4
            found["attn_mask"][1] = False
        if self.key_bias:
            found["attn_mask"] = data(BATCH, 1, 1, self.keys)
        if self.mask:
            found["attn_mask"] = torch.rand(1, self.heads, LENGTH, self.keys, generator=generator) > 0.4
        if self.bias:
            found["bias"] = data(1, self.heads, LENGTH, self.keys)
        if self.buckets:
            found["table"] = data(self.buckets, self.heads)
        return found

    def gradients(self) -> list[str]:
        return ["query", "key", "value", *(["bias"] if self.bias else []), *(["table"] if self.buckets else [])]

    def call(self, tensors: dict[str, torch.Tensor], cu_seqlens: torch.Tensor | None):
        options: dict[str, Any] = {"window": self.window, "softcap": self.softcap, "return_lse": True}
        if self.buckets:
            options["relative_bias"] = tf.RelativeBias(tensors["table"], self.max_distance, not self.causal)
        q, k, v = (tensors[n] for n in ("query", "key", "value"))
        if self.unpadded:
            return tf.varlen_attention(q, k, v, cu_seqlens, is_causal=self.causal, **options)
        if self.lengths:
            options["key_lengths"] = torch.tensor(self.lengths)
        return tf.scaled_dot_product_attention(
            q, k, v, tensors.get("attn_mask"), is_causal=self.causal, enable_gqa=True, bias=tensors.get("bias"),
            **options,
        )  # fmt: skip

    def cu_seqlens(self) -> torch.Tensor | None:
        return torch.tensor([0, *self.unpadded]).cumsum(0).int() if self.unpadded else None

    def alone(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The result on one process, in plain PyTorch."""
        with tf.backend("eager"):
            tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in self.tensors().items()}
            return self._run(tensors, self.cu_seqlens())

    def _run(self, tensors, cu_seqlens) -> dict[str, torch.Tensor]:
        for name in self.gradients():
            tensors[name] = tensors[name].detach().requires_grad_()
        out, lse = self.call(tensors, cu_seqlens)
        seen = lse.isfinite()
        upstream = tensors["grad_lse"].to(lse.dtype).masked_fill(~seen, 0.0)
        torch.autograd.backward([out, lse], [tensors["grad_out"].to(out.dtype), upstream])
        grads = {f"d_{name}": tensors[name].grad for name in self.gradients()}
        return {"out": out.detach(), "lse": lse.detach().masked_fill(~seen, 0.0), **grads}

    def spread(self, cp: tf.distributed.context_parallel) -> dict[str, torch.Tensor]:
        """The result on all processes of cp, with the parts put together in each process."""
        cu = self.cu_seqlens()
        along = {"query": 2, "key": 2, "value": 2, "grad_out": 2, "grad_lse": 2, "bias": 2, "attn_mask": 3}
        if self.unpadded:
            along = {"query": 0, "key": 0, "value": 0, "grad_out": 0, "grad_lse": 1}
        if self.mask:
            along["attn_mask"] = 2
        parts = {n: cp.shard(t, along[n], cu) if n in along else t for n, t in self.tensors().items()}
        local = None if cu is None else cp.shard_cu_seqlens(cu)
        with cp:
            found = self._run(parts, local)
        whole = {}
        for name, t in found.items():
            if name == "d_table":
                dist.all_reduce(t)
                whole[name] = t
            else:
                dim = (1 if name == "lse" else 0) if self.unpadded else 2
                whole[name] = _joined(cp, t.detach(), dim, local)
        return whole


def _joined(cp, t: torch.Tensor, dim: int, cu: torch.Tensor | None) -> torch.Tensor:
    parts = [torch.empty_like(t.contiguous()) for _ in range(cp.size)]
    dist.all_gather(parts, t.contiguous())
    order = cp.layout.restoring(t.shape[dim], cu)
    return torch.cat(parts, dim).index_select(dim, order)


CASES = [
    Case("full, shared keys, softcap", key_heads=2, softcap=2.0),
    Case("causal", causal=True),
    Case("causal, bfloat16", causal=True, dtype=torch.bfloat16),
    Case("causal, not balanced", causal=True, load_balance=False),
    Case("other keys than queries", keys=48),
    Case("causal window across chunks", causal=True, window=(5, None)),
    Case("window to both sides", window=(2, 6)),
    Case("window, not balanced", window=(9, 3), load_balance=False),
    Case("relative bias", buckets=8),
    Case("causal relative bias", causal=True, buckets=8, max_distance=5),
    Case("relative bias and window", buckets=8, max_distance=40, window=(11, 4), bias=True),
    Case("key lengths", lengths=(32, 9), causal=True),
    Case("key lengths and a mask of the keys", lengths=(32, 9), key_mask=True),
    Case("key lengths and a mask with all columns", lengths=(32, 9), mask=True),
    Case("a sequence without keys", key_mask=True),
    Case("bias of the keys", key_bias=True, causal=True),
    Case("mask and bias with all columns", mask=True, bias=True, causal=True),
    Case("unpadded, causal", unpadded=(16, 32, 8), causal=True),
    Case("unpadded, shared keys", unpadded=(24, 8), key_heads=2),
    Case("unpadded, not balanced", unpadded=(12, 20), causal=True, load_balance=False),
    Case("unpadded window", unpadded=(16, 24), causal=True, window=(3, None), refused_by=("ring",)),
]
