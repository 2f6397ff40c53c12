"""Token, position and segment embeddings, only of the positions that are computed."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .. import ops
from .projection import add_norm, dropout_p, is_plain, norm
from .unpadding import Unpadding

__all__ = ["OutOfRange", "check_indices", "embed", "look_up"]


class OutOfRange(ValueError, IndexError):
    """torch's embedding raises an IndexError, which programs may catch."""


def check_indices(name: str, ids: torch.Tensor, size: int, meaning: str) -> None:
    """Raise OutOfRange if an id is outside [0, size). Only plain tensors on the CPU are checked: elsewhere it would
    synchronise. meaning: what size is, for the message."""
    if ids.device.type != "cpu" or not ids.numel() or torch.compiler.is_compiling() or not ops.concrete(ids):
        return
    low, high = (int(v) for v in ids.aminmax())
    if low < 0 or high >= size:
        raise OutOfRange(f"{name}: wanted values in [0, {size}) ({meaning}), got {low}..{high}")


def look_up(words: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """words(ids); by ops.embedding if `words` is a plain nn.Embedding, or a transformers one that scales its rows."""
    kind: Any = type(words)
    scales = kind.__name__.endswith("ScaledWordEmbedding") and kind.__module__.startswith("transformers.")
    if not (kind is nn.Embedding or (scales and kind.__bases__ == (nn.Embedding,))) or not is_plain(words, kind):  # type: ignore[arg-type]
        return words(ids)
    module: Any = words
    scale = module.embed_scale if scales else 1.0
    if module.max_norm is not None or module.scale_grad_by_freq or module.sparse or not isinstance(scale, (int, float)):
        return words(ids)
    x = ops.embedding(ids, module.weight, module.padding_idx)
    return x * scale if scales else x


def embed(
    unpadding: Unpadding,
    word: Callable[[torch.Tensor], torch.Tensor],
    position: Callable[[torch.Tensor], torch.Tensor] | None,
    segment: nn.Module | None,
    norm_module: nn.Module | None,
    dropout: nn.Module | float | None,
    *,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    segment_ids: torch.Tensor | None,
    past: int | torch.Tensor = 0,
) -> torch.Tensor:
    """dropout(norm(word + segment + position)): (B, S, E), or (total, E) if padding is dropped.

    word, position: modules or functions of ids. norm_module: None for no norm (GPT). position_ids: (B, S) or (1, S),
    default past, past + 1, ... segment_ids: (B, S), default 0.
    Source: Devlin et al., "BERT", 2019, section 3.
    """
    x = unpadding.unpad(inputs_embeds) if inputs_embeds is not None else look_up(word, unpadding.unpad(input_ids))  # type: ignore[arg-type]
    added = _added(unpadding, position, segment, position_ids, segment_ids, past, x.device)
    if norm_module is None:
        y = x if added is None else x + added
    else:
        y = norm(norm_module, x) if added is None else add_norm(norm_module, x, added.expand_as(x), 0.0)
    return ops.dropout(y, dropout_p(dropout))


def _added(unpadding, position, segment, position_ids, segment_ids, past, device) -> torch.Tensor | None:
    """position + segment of the computed positions, or (S, E) if it is the same for all sequences."""
    if position is None and segment is None:
        return None
    rows = None
    if position_ids is not None and position is not None:
        rows = position(unpadding.unpad(position_ids.expand(unpadding.batch, -1)))
    elif position is not None:
        # There are few different rows: compute each once, then copy.
        rows = position(unpadding.columns(device) + past)
        kinds = getattr(segment, "num_embeddings", 0) if segment_ids is not None else 1
        if segment is not None and 0 < kinds <= 4:
            rows = (segment(torch.arange(kinds, device=device))[:, None] + rows).flatten(0, 1)
            segment = None
            folded = kinds > 1
        else:
            folded = False
        if folded:
            index = unpadding.unpad(segment_ids.expand(unpadding.batch, -1)) * unpadding.length
            column = torch.arange(unpadding.length, device=device)
            index = index + (column if unpadding.index is None else unpadding.index % unpadding.length)
            rows = rows.index_select(0, index.flatten()).unflatten(0, index.shape)
        elif unpadding.index is not None:
            rows = rows.index_select(0, unpadding.positions(device))
    if segment is None:
        return rows
    if segment_ids is None:
        kind = segment(torch.zeros(1, dtype=torch.long, device=device))
    else:
        kind = segment(unpadding.unpad(segment_ids.expand(unpadding.batch, -1)))
    return kind if rows is None else rows + kind
