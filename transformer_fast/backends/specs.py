"""One call of an op, by name: what travels through schema, fake, autograd and backends.

A registered op's schema is made from the fields of its spec (ops/_common.py), in their order, and so is what its
backward pass keeps: a new argument is one field here.
"""

import functools
import operator
import typing
from collections.abc import Callable
from typing import Annotated, NamedTuple

import torch

# An integer that a compiler may leave open.
SymInt = Annotated[int, "SymInt"]


class AttentionSpec(NamedTuple):
    """One call. Padded when cu_seqlens_q is None, else packed.

    Query i of sequence b stands at position i + offset, offset = Sk_b - Sq_b when bottom_right else 0; Sk_b is
    key_lengths[b] where given. Key j takes part when j < Sk_b, mask holds, and
    position - window_left <= j <= position + window_right (a side of -1 is unlimited; causal is right = 0).
    score = softcap(scale * q.k) + bias + relative_bias[bucket(j - position), h].
    """

    query: torch.Tensor  # (B, H, Sq, D) or (total_q, H, D)
    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor | None  # 4-D, broadcasts to (B, H, Sq, Sk)
    mask: torch.Tensor | None  # bool, 4-D, broadcasts likewise
    key_lengths: torch.Tensor | None  # (B,)
    cu_seqlens_q: torch.Tensor | None  # (B + 1,) int32
    cu_seqlens_k: torch.Tensor | None
    max_seqlen_q: SymInt
    max_seqlen_k: SymInt
    relative_bias: torch.Tensor | None  # (buckets, H)
    relative_max_distance: int
    relative_bidirectional: bool
    rng: torch.Tensor | None  # {seed, offset}
    scale: float
    bottom_right: int
    window_left: int
    window_right: int
    softcap: float
    dropout_p: float


class NormSpec(NamedTuple):
    """One call: v = residual + dropout(x); y = weight * (v - mean) * rstd + bias, all (rows, width)."""

    x: torch.Tensor
    residual: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    rng: torch.Tensor | None
    eps: float
    rms: bool
    dropout_p: float


class CrossEntropySpec(NamedTuple):
    """One call on (rows, classes) logits. With p = softmax(x), w the class weights (1 where there are none),
    e the label smoothing and y the target, the loss of a row that is not ignored is

        (1 - e) w[y] (-log p[y]) + e / classes * sum_j w[j] (-log p[j]) + z_loss * logsumexp(x)^2
    """

    logits: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor | None
    ignore_index: int
    label_smoothing: float
    z_loss: float


class EmbeddingSpec(NamedTuple):
    """One call: v = word[ids] + token_type[token_type_ids] + position[position_ids], (rows, width); y = dropout(
    layer_norm(v)). ids are flat int64 and contiguous; a table is (entries, width) with unit stride along the width."""

    ids: torch.Tensor
    word: torch.Tensor
    position_ids: torch.Tensor | None
    position: torch.Tensor | None
    type_ids: torch.Tensor | None
    token_type: torch.Tensor | None
    norm_weight: torch.Tensor | None
    norm_bias: torch.Tensor | None
    rng: torch.Tensor | None
    eps: float
    dropout_p: float
    padding_idx: int


class AdditiveAttentionSpec(NamedTuple):
    """One call: query (B, Sq, D), key (B, Sk, D), value (B, Sk, Dv) with unit last stride; score_weight and bias (D,);
    mask bool (B, Sq, Sk), any strides; key_lengths int64 (B,), contiguous."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    score_weight: torch.Tensor
    bias: torch.Tensor | None
    mask: torch.Tensor | None
    key_lengths: torch.Tensor | None


@functools.cache
def _constants_of(kind: type[tuple]) -> Callable[[tuple], tuple]:
    hints = typing.get_type_hints(kind)
    return operator.itemgetter(*(i for i, hint in enumerate(hints.values()) if hint in (int, float, bool)))


def constants(spec: tuple) -> tuple:
    """The fields of a spec that are no tensors."""
    return _constants_of(type(spec))(spec)
