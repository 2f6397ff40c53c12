"""The arguments of each op as a named tuple, which schema, fake kernel, autograd and backends share.

The schema of a registered op is generated from the fields of its spec, in their order (ops/_common.py), and so is what
is saved for its backward pass. A new argument is one new field here.
"""

import functools
import operator
import typing
from collections.abc import Callable
from typing import Annotated, NamedTuple

import torch

# An integer that may be symbolic under torch.compile.
SymInt = Annotated[int, "SymInt"]


class AttentionSpec(NamedTuple):
    """One attention call: padded if cu_seqlens_q is None, else unpadded.

    Query i of sequence b has position i + offset, with offset = Sk_b - Sq_b if bottom_right, else 0. Sk_b is
    key_lengths[b] where given. Query i attends to key j if j < Sk_b, mask is True, and
    position - window_left <= j <= position + window_right (-1 means no limit; causal is window_right = 0).
    score = softcap(scale * q.k) + bias + relative_bias[bucket(j - position), h].
    """

    query: torch.Tensor  # (B, H, Sq, D) or (total_q, H, D)
    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor | None  # 4-D, broadcasts to (B, H, Sq, Sk)
    mask: torch.Tensor | None  # bool, 4-D, broadcasts to (B, H, Sq, Sk); True takes part
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


def repeatable(spec: AttentionSpec) -> bool:
    """Whether the call has no other tensors than query, key, value, one tensor of cumulative lengths, and rng, as the
    kernels read them."""
    cu, rng = spec.cu_seqlens_q, spec.rng
    return (
        all(t is None for t in (spec.bias, spec.mask, spec.key_lengths, spec.relative_bias))
        and cu is spec.cu_seqlens_k
        and (cu is None or (cu.dtype == torch.int32 and cu.is_contiguous()))
        and (rng is None or rng.is_contiguous())
    )


class RecurrenceSpec(NamedTuple):
    """One recurrent layer over whole sequences: an LSTM (G = 4 gates) if memory is given, else a GRU (G = 3)."""

    gates: torch.Tensor  # (positions, G * H): the contribution of the input to the gates
    weight: torch.Tensor  # (G * H, H): weight_hh
    bias: torch.Tensor | None  # (G * H,): bias_hh
    hidden: torch.Tensor  # (B, H), before the first step
    memory: torch.Tensor | None  # (B, H), before the first step
    sequences: torch.Tensor  # int64 (3, B): first position, length, and the sequences' indices, longest first
    steps: SymInt  # at least the length of the longest sequence
    reverse: bool  # run each sequence from its last position to its first
    gaps: bool  # some positions belong to no sequence


class RecurrentStepSpec(NamedTuple):
    """One decoding step of a recurrent decoder, one token per row: an LSTM if memory is given, else a GRU.

    Without maxout the cells read [word; feed], and the readout is tanh(W [context; state]), where the context comes
    from the state after the step. With maxout the cells read [word; context], where the context comes from the state
    before the step, and the readout is the maximum over pairs of neighbours of W [state; word; context] + b. Without
    values the readout is the state.
    """

    ids: torch.Tensor  # int64 (R,)
    token: torch.Tensor  # (V, E), the embedding table
    hidden: torch.Tensor  # (L, R, H), before the step
    memory: torch.Tensor | None  # (L, R, H)
    feed: torch.Tensor | None  # (R, P), the last readout
    keys: torch.Tensor | None  # (N, S, W); None: the context is values[:, 0]
    values: torch.Tensor | None  # (N, S, H)
    mask: torch.Tensor | None  # bool (N, S); True takes part
    sources: torch.Tensor | None  # int64 (R,): the index in N that each row attends to; None: row r attends to r
    query: torch.Tensor | None  # (W, H): projection of the state to the query; None: the state is the query
    score_weight: torch.Tensor | None  # (W,), of additive scores; None: dot products
    cells: list[torch.Tensor | None]  # weight_ih, weight_hh, bias_ih, bias_hh of each layer
    readout: torch.Tensor | None  # (P, 2 * H), with maxout (2 * P, 2 * H + E)
    readout_bias: torch.Tensor | None
    head: torch.Tensor  # (vocabulary, P or H)
    head_bias: torch.Tensor | None
    maxout: bool


class NormSpec(NamedTuple):
    """One norm call: v = residual + dropout(x); y = weight * (v - mean) * rstd + bias, all (rows, width)."""

    x: torch.Tensor
    residual: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    rng: torch.Tensor | None
    eps: float
    rms: bool
    dropout_p: float


class RotaryAppendSpec(NamedTuple):
    """One call: query (B, S, H, D), key and value (B, S, key heads, D), and caches (B, key heads, capacity, D), all
    with last stride 1; cos and sin as in the backend's rotary_embedding; positions int64 (B, S), None for cache_lengths
    + 0 .. S - 1."""

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
    """One call on (rows, classes) logits. With p = softmax(x), w the class weights (1 if there are none),
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
    """One call: query (B, Sq, D), key (B, Sk, D), value (B, Sk, Dv), all with unit last stride; score_weight and bias
    (D,); mask bool (B, Sq, Sk) with any strides; key_lengths int64 (B,), contiguous."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    score_weight: torch.Tensor
    bias: torch.Tensor | None
    mask: torch.Tensor | None
    key_lengths: torch.Tensor | None


class Layout(NamedTuple):
    """Splits a spec into its tensors and its constants and joins them again. tensors, constants: select those fields,
    in order. order: the spec's fields from (*tensors, *constants)."""

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
