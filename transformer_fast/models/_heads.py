"""Heads on unpadded rows: HF's logits and losses, computed only at the positions that are read."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import ops
from ..layers import Unpadding
from ..layers.projection import linear
from ..ops._common import autocast_dtype

__all__ = [
    "IGNORE",
    "classification_loss",
    "every_position",
    "is_labelled",
    "keep_positions",
    "kept_positions",
    "masked_lm",
    "per_position",
    "span_loss",
    "span_scores",
    "token_loss",
    "vocabulary_logits",
]

IGNORE = -100
_CHUNK = 256  # rows of logits computed at a time


def per_position(labels: torch.Tensor | None, source: torch.Tensor) -> torch.Tensor | None:
    """labels in the shape (B, S) of source (B, S, ...), if their number of elements fits: HF's losses flatten them."""
    shape = source.shape[:2]
    if labels is None or labels.shape == shape or labels.numel() != shape.numel():
        return labels
    return labels.reshape(shape)


def is_labelled(labels: torch.Tensor | None) -> torch.Tensor | None:
    """(B, S) bool: positions whose logits the loss reads. A label on padding counts, as in HF."""
    return None if labels is None else labels != IGNORE


def kept_positions(
    source: torch.Tensor, logits_to_keep: int | torch.Tensor, shifted: torch.Tensor | None, crosses: bool = False
) -> torch.Tensor | None:
    """(B, S) bool: positions that a causal head reads even where they are padding. crosses: it reads an encoder, as in
    HF's EncoderDecoderModel, which computes the loss itself and masks the decoder's inputs that equal the padding
    token, its first one too where that is the start token."""
    read = is_labelled(shifted)
    if crosses and read is None:
        return every_position(source)
    if isinstance(logits_to_keep, int) and not logits_to_keep:
        return read
    if read is None:
        read = torch.zeros(source.shape[:2], dtype=torch.bool, device=source.device)
    if isinstance(logits_to_keep, int):
        read[:, -logits_to_keep:] = True
    elif logits_to_keep.dtype == torch.bool:
        read = read | logits_to_keep
    elif logits_to_keep.dim() == 2:
        read = read.scatter(1, logits_to_keep % read.shape[1], True)
    else:
        read[:, logits_to_keep] = True
    return read


def keep_positions(states: torch.Tensor, which: int | torch.Tensor) -> torch.Tensor:
    """States (B, S, E) at the positions that HF's logits_to_keep selects.

    which: how many of the last positions, 0 for all; or indices, (K,) for all rows or (B, K) per row; or a bool mask
    (B, S), for which the result is (N, E).
    """
    if isinstance(which, int) and not which:
        return states
    ops.parallel.refuse("logits_to_keep", "wanted 0 there")
    if isinstance(which, int):
        return states[:, -which:]
    if which.dim() == 2:
        return states[which] if which.dtype == torch.bool else torch.take_along_dim(states, which[..., None], dim=1)
    return states[:, which]


def vocabulary_logits(decoder: nn.Module, rows: torch.Tensor, unpadding: Unpadding) -> torch.Tensor:
    """Logits (B, S, V), zeros at positions that were not computed."""
    if unpadding.index is None:
        return linear(decoder, rows)
    if torch.is_grad_enabled() or not isinstance(decoder, nn.Linear) or autocast_dtype(rows.device) is not None:
        return unpadding.pad(linear(decoder, rows))
    # The vocabulary is wide: a second full copy would cost more memory than padding does.
    out = rows.new_zeros(unpadding.batch * unpadding.length, decoder.out_features)
    for part, index in zip(rows.split(_CHUNK), unpadding.index.split(_CHUNK)):
        out[index] = linear(decoder, part)
    return out.unflatten(0, (unpadding.batch, unpadding.length))


def masked_lm(
    decoder: nn.Module,
    rows: torch.Tensor,
    unpadding: Unpadding,
    labels: torch.Tensor | None,
    score: Any = F.cross_entropy,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(cross entropy over the labelled positions or None, logits (B, S, V)). score(logits, labels): the loss function.

    With labels, the logits of labelled and of other positions are separate matrix products. So the backward pass of the
    loss computes the labelled rows only. The other logits have gradients too, for users of the logits.
    """
    if labels is None:
        return None, vocabulary_logits(decoder, rows, unpadding)
    _check_labels("labels", labels, (unpadding.batch, unpadding.length))
    if torch.compiler.is_compiling() or not ops.concrete(labels):  # the number of labelled positions depends on data
        logits = unpadding.pad(linear(decoder, rows))
        return score(logits.flatten(0, 1), labels.to(rows.device).flatten()), logits
    labels = unpadding.unpad(labels.to(rows.device))
    rows, labels = rows.reshape(-1, rows.shape[-1]), labels.reshape(-1)
    chosen = labels != IGNORE
    labelled, others = chosen.nonzero().squeeze(1), (~chosen).nonzero().squeeze(1)
    scores = linear(decoder, rows.index_select(0, labelled))
    loss = score(scores, labels.index_select(0, labelled))
    rest = linear(decoder, rows.index_select(0, others))
    to, vocabulary = unpadding.index, scores.shape[-1]
    out = scores.new_zeros(unpadding.batch * unpadding.length, vocabulary)
    for where, what in ((labelled, scores), (others, rest)):
        out = out.index_copy_(0, where if to is None else to.index_select(0, where), what)
    return loss, out.view(unpadding.batch, unpadding.length, vocabulary)


def token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of (B, S, C) over the labelled positions."""
    _check_labels("labels", labels, tuple(logits.shape[:-1]))
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1).to(logits.device))


def _check_labels(name: str, labels: torch.Tensor, shape: tuple) -> None:
    if tuple(labels.shape) != tuple(shape):
        raise ValueError(f"{name}: wanted shape {tuple(shape)}, got {tuple(labels.shape)}")


def classification_loss(config, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """HF's rule: config.problem_type, else regression for one label, classes for integer labels, else multi-label."""
    labels = labels.to(logits.device)
    if config.problem_type is None:
        if config.num_labels == 1:
            config.problem_type = "regression"
        elif labels.dtype in (torch.long, torch.int):
            config.problem_type = "single_label_classification"
        else:
            config.problem_type = "multi_label_classification"
    if config.problem_type == "regression":
        if config.num_labels == 1:
            return F.mse_loss(logits.squeeze(), labels.squeeze())
        return F.mse_loss(logits, labels)
    if config.problem_type == "single_label_classification":
        return F.cross_entropy(logits.view(-1, config.num_labels), labels.view(-1))
    if config.problem_type == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits, labels)
    raise ValueError(
        "config.problem_type: wanted 'regression', 'single_label_classification' or 'multi_label_classification', got "
        f"{config.problem_type!r}"
    )


def every_position(source: torch.Tensor) -> torch.Tensor:
    """(B, S) bool for source (B, S, ...), all True: for a head that reads padding too."""
    return torch.ones(source.shape[:2], dtype=torch.bool, device=source.device)


def span_scores(logits: torch.Tensor, unpadding: Unpadding) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (..., 2) -> (start_logits, end_logits), (B, S) each. At padding they are the dtype's lowest number, so that
    no argmax picks it."""
    logits = unpadding.pad(logits, fill=torch.finfo(logits.dtype).min)
    start, end = (t.squeeze(-1).contiguous() for t in logits.split(1, dim=-1))
    return start, end


def span_loss(start_logits, end_logits, start_positions, end_positions) -> torch.Tensor:
    """Mean of the cross entropies of the first and the last token of the answer; positions outside are ignored."""
    ops.parallel.refuse("start_positions, end_positions: the softmax over positions", "train it on whole sequences")
    ignored = start_logits.size(1)
    losses = []
    for logits, positions in ((start_logits, start_positions), (end_logits, end_positions)):
        positions = positions.squeeze(-1) if positions.dim() > 1 else positions
        losses.append(F.cross_entropy(logits, positions.to(logits.device).clamp(0, ignored), ignore_index=ignored))
    return (losses[0] + losses[1]) / 2
