"""The loss over a sequence's logits, with label smoothing."""

import torch

from .. import ops
from ._heads import IGNORE

__all__ = ["sequence_loss"]


def sequence_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    label_smoothing: float = 0.0,
    num_items_in_batch: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross entropy of logits (B, T, V) over the labels (B, T) that are not -100: the mean, or with num_items_in_batch
    (Trainer's gradient accumulation) the sum divided by it."""
    if tuple(labels.shape) != tuple(logits.shape[:2]):
        raise ValueError(f"labels: wanted shape {tuple(logits.shape[:2])}, got {tuple(labels.shape)}")
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = ops.cross_entropy(
        logits.flatten(0, 1), labels.flatten().to(logits.device), ignore_index=IGNORE, reduction=reduction,
        label_smoothing=label_smoothing,
    )  # fmt: skip
    return loss if num_items_in_batch is None else loss / num_items_in_batch
