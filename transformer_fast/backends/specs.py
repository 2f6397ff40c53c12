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
    """One call. Padded when cu_seqlens_q is None, else unpadded.

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


class RecurrenceSpec(NamedTuple):
    """One call, of an LSTM where there is a memory, else of a GRU; G gates of width H."""

    gates: torch.Tensor  # (positions, G * H), what the input gives the gates
    weight: torch.Tensor  # (G * H, H), of the hidden state
    bias: torch.Tensor | None  # (G * H,), beside it
    hidden: torch.Tensor  # (B, H), before the first step
    memory: torch.Tensor | None  # (B, H)
    sequences: torch.Tensor  # int64 (3, B): where each begins, its length, and their order, longest first
    steps: SymInt  # at least the longest
    reverse: bool  # from the last position of each to its first
    gaps: bool  # some positions belong to no sequence


class RecurrentStepSpec(NamedTuple):
    """One call: a token a row through a recurrent decoder, an LSTM where there is a memory, else a GRU.

    Without maxout the cells read [word; feed], and the readout is tanh(W [context; state]), with the context of the
    state after the step. With it they read [word; context], with the context of the state before, and the readout is
    the maximum of each two neighbours of W [state; word; context] + b. Without values the readout is the state.
    """

    ids: torch.Tensor  # int64 (R,)
    token: torch.Tensor  # (V, E)
    hidden: torch.Tensor  # (L, R, H), before the step
    memory: torch.Tensor | None  # (L, R, H)
    feed: torch.Tensor | None  # (R, P), the last readout
    keys: torch.Tensor | None  # (N, S, W); None: the context is values[:, 0]
    values: torch.Tensor | None  # (N, S, H)
    mask: torch.Tensor | None  # bool (N, S); True takes part
    sources: torch.Tensor | None  # int64 (R,), which of N a row attends to; None: its own
    query: torch.Tensor | None  # (W, H), of the state that is scored
    score_weight: torch.Tensor | None  # (W,), of additive scores; None: products
    cells: list[torch.Tensor | None]  # of each layer weight_ih, weight_hh, bias_ih, bias_hh
    readout: torch.Tensor | None  # (P, 2 * H), with maxout (2 * P, 2 * H + E)
    readout_bias: torch.Tensor | None
    head: torch.Tensor  # (vocabulary, P or H)
    head_bias: torch.Tensor | None
    maxout: bool


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


class RotaryAppendSpec(NamedTuple):
    """One call: query, key, value (B, S, H, D) and caches (B, key heads, capacity, D), all with last stride 1; cos, sin
    as the backend's rotary_embedding takes them; positions int64 (B, S), None for those behind cache_lengths."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    cache_lengths: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    positions: torch.Tensor | None
    query_weight: torch.Tensor | None
    key_weight: torch.Tensor | None
    eps: float
    interleaved: bool


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


class Layout(NamedTuple):
    """Where the fields of a spec stand. tensors, constants: each of them, in order; order: a spec's fields from
    (*tensors, *constants)."""

    tensor_count: int
    tensors: Callable[[tuple], tuple]
    constants: Callable[[tuple], tuple]
    order: Callable[[tuple], tuple]


@functools.cache
def layout(kind: type[tuple]) -> Layout:
    hints = list(typing.get_type_hints(kind).values())
    constant = [i for i, hint in enumerate(hints) if hint in (int, float, bool)]
    tensor = [i for i in range(len(hints)) if i not in constant]
    places = [*tensor, *constant]
    order = operator.itemgetter(*(places.index(i) for i in range(len(hints))))
    return Layout(len(tensor), _getter(tensor), _getter(constant), order)


def _getter(index: list[int]) -> Callable[[tuple], tuple]:
    return operator.itemgetter(*index) if len(index) > 1 else lambda fields: tuple(fields[i] for i in index)
