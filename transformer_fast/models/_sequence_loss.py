"""Teacher forcing: the decoder's input made of labels, and the loss over a sequence's logits."""

import torch

from .. import ops
from ._heads import IGNORE

__all__ = ["sequence_loss", "shift_right"]


def shift_right(labels: torch.Tensor, start: int | None, padding: int | None) -> torch.Tensor:
    """Decoder input ids: `start`, then the labels but the last; padding where a label is ignored."""
    if start is None or padding is None:
        raise ValueError(
            "labels: the decoder's input is made of them with config.decoder_start_token_id and config.pad_token_id, "
            f"got {start} and {padding}"
        )
    shifted = torch.cat((torch.full_like(labels[:, :1], start), labels[:, :-1]), 1)
    return shifted.masked_fill(shifted == IGNORE, padding)


def sequence_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    label_smoothing: float = 0.0,
    num_items_in_batch: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross entropy of (B, T, V) over the labels (B, T) that are not -100: their mean, or with num_items_in_batch
    (Trainer's gradient accumulation) their sum over that number."""
    if tuple(labels.shape) != tuple(logits.shape[:2]):
        raise ValueError(f"labels: wanted shape {tuple(logits.shape[:2])}, got {tuple(labels.shape)}")
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = ops.cross_entropy(
        logits.flatten(0, 1), labels.flatten().to(logits.device), ignore_index=IGNORE, reduction=reduction,
        label_smoothing=label_smoothing,
    )  # fmt: skip
    return loss if num_items_in_batch is None else loss / num_items_in_batch
