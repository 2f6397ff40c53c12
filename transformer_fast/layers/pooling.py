"""Pooling of the token states of a sequence into one vector."""

import torch

__all__ = ["concat_pooling"]


def concat_pooling(states: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """[h_T; max_t h_t; mean_t h_t]: the last token's state, and maximum and mean of each feature over the tokens.

    A classifier then also sees words whose information the last state may have lost. It works on the last_hidden_state
    of every model.

    Args:
        states: (B, S, D), floating point.
        attention_mask: (B, S), nonzero for tokens, padding on either side; default: all are tokens.

    Returns:
        (B, 3 * D) in states' dtype; zeros for a row without tokens.

    Raises:
        ValueError: for other shapes.

    Source:
        Howard and Ruder, "Universal Language Model Fine-tuning for Text Classification", 2018, section 3.3.

    Examples:
        >>> import torch, transformer_fast
        >>> transformer_fast.concat_pooling(torch.tensor([[[1.0], [5.0], [9.0]]]), torch.tensor([[1, 1, 0]]))
        tensor([[5., 5., 3.]])
    """
    if states.dim() != 3:
        raise ValueError(f"states: wanted shape (B, S, D), got {tuple(states.shape)}")
    if attention_mask is None:
        attention_mask = states.new_ones(states.shape[:2], dtype=torch.bool)
    if tuple(attention_mask.shape) != tuple(states.shape[:2]):
        raise ValueError(f"attention_mask: wanted shape {tuple(states.shape[:2])}, got {tuple(attention_mask.shape)}")
    batch, length, width = states.shape
    if not length:
        return states.new_zeros(batch, 3 * width)
    tokens = (attention_mask != 0)[..., None]
    at = (tokens[..., 0] * torch.arange(1, length + 1, device=states.device)).argmax(1)
    kept = states.masked_fill(~tokens, 0.0)  # so that NaN in padding does not reach the sums
    last = kept[torch.arange(batch, device=states.device), at]
    count = tokens.sum(1)
    largest = kept.masked_fill(~tokens, -torch.inf).amax(1).masked_fill(count == 0, 0.0)
    wide = torch.promote_types(states.dtype, torch.float32)
    mean = (kept.to(wide).sum(1) / count.clamp(min=1)).to(states.dtype)
    return torch.cat((last, largest, mean), 1)
