"""Code that GPT and GPT-2 share: the base model, and heads that read some of its positions."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import logging

from .. import ops
from ..layers import StackCall, TransformerSpec, Unpadding
from ..layers.embeddings import embed
from ..layers.projection import linear
from ._base import Encoded, ModelMixin, Want, check_inputs
from ._heads import IGNORE, classification_loss, is_labelled, vocabulary_logits
from ._run_stack import Inputs, Stack

__all__ = [
    "GPTBase",
    "causal_logits",
    "classify_last",
    "double_heads",
    "flatten_labels",
    "flatten_leading",
    "shifted_labels",
]

logger = logging.get_logger(__name__)


class GPTBase(Stack, ModelMixin):
    """For the base model. Segments are embedded by the token embedding, as in both GPTs."""

    h: Any
    drop: Any
    _positions_setting = "config.n_positions"

    def _layers(self):
        return self.h

    def _position_table(self) -> Any:
        """The embedding of positions."""
        raise NotImplementedError

    def _causal(self, kwargs: dict) -> bool:
        return True

    def _most_positions(self) -> int | None:
        return self._position_table().num_embeddings

    def _segments(self) -> tuple[int, str] | None:
        return self._words().num_embeddings, self._words_setting

    def _plan(self, spec: TransformerSpec, inputs: Inputs, batch: int, length: int, device, **options) -> StackCall:
        if not len(self.h):  # a cache without layers has no length, and there is no attention to mask
            inputs = inputs._replace(attention_mask=None)
        return super()._plan(spec, inputs, batch, length, device, **options)

    def _embed(self, unpadding: Unpadding, inputs: Inputs, positions: torch.Tensor | None, past) -> torch.Tensor:
        words, segments = self._words(), inputs.token_type_ids
        return embed(
            unpadding, words, self._position_table(), None if segments is None else words, None, self.drop,
            input_ids=inputs.input_ids, inputs_embeds=inputs.inputs_embeds, position_ids=positions,
            segment_ids=segments, past=past,
        )  # fmt: skip


def flatten_leading(inputs: Inputs) -> tuple[torch.Size | None, Inputs]:
    """Flatten inputs (..., S), as multiple choice heads pass them, to (B, S). Returns the leading shape, or None where
    it has one dimension, and the inputs."""
    ids, embeds = inputs.input_ids, inputs.inputs_embeds
    source, trailing = (ids, 1) if ids is not None else (embeds, 2)
    if source is None or source.dim() <= trailing + 1:
        return None, inputs
    leading, found = source.shape[:-trailing], {}
    for name, t in inputs.given().items():
        dims = 2 if name == "inputs_embeds" else 1
        if t.dim() == len(leading) + dims:
            found[name] = t.reshape(-1, *t.shape[-dims:])
    return leading, inputs._replace(**found)


def flatten_labels(leading: torch.Size | None, labels: torch.Tensor | None, kwargs: dict):
    """labels, and the shift_labels of kwargs, in the shape that flatten_leading gives the inputs."""
    if leading is None:
        return labels, kwargs
    flat = {k: kwargs[k].flatten(0, -2) for k in ("shift_labels",) if kwargs.get(k) is not None}
    return None if labels is None else labels.flatten(0, -2), {**kwargs, **flat}


def shifted_labels(labels: torch.Tensor | None, given: torch.Tensor | None) -> torch.Tensor | None:
    """Labels for position i to predict token i + 1; `given`, where they are shifted already."""
    if given is None and labels is not None:
        ops.parallel.refuse("labels: the token after a position", "give shift_labels too, as shard_batch makes them")
    return F.pad(labels, (0, 1), value=IGNORE)[..., 1:] if given is None and labels is not None else given


def causal_logits(
    model: Any, encoded: Encoded, logits_to_keep: int | torch.Tensor, labels, shifted, kwargs: dict
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(HF's causal language modelling loss or None, logits (B, S or number of kept positions, V))."""
    kept, head = encoded.kept(logits_to_keep), model.lm_head
    rows, unpadding = kept.rows, kept.unpadding
    if labels is None:
        return None, vocabulary_logits(head, rows, unpadding)
    logits = linear(head, rows)
    if kept is not encoded or model.loss_function is not ForCausalLMLoss:
        logits = unpadding.pad(logits)
        return model.loss_function(logits, labels, model.config.vocab_size, **kwargs), logits
    targets = unpadding.unpad(_like(shifted, unpadding).to(logits.device)).reshape(-1)
    count = kwargs.get("num_items_in_batch")
    reduction = "mean" if count is None else "sum"
    ignored = kwargs.get("ignore_index", IGNORE)
    loss = ops.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets, ignore_index=ignored, reduction=reduction)
    if count is not None:
        loss = loss / (count.to(loss.device) if isinstance(count, torch.Tensor) else count)
    return loss, unpadding.pad(logits)


def _like(labels: torch.Tensor, unpadding: Unpadding) -> torch.Tensor:
    if tuple(labels.shape) != (unpadding.batch, unpadding.length):
        raise ValueError(f"labels: wanted shape {(unpadding.batch, unpadding.length)}, got {tuple(labels.shape)}")
    return labels


def classify_last(model: Any, inputs: Inputs, run: Callable, labels, kwargs: dict):
    """Classify by the last token that is not config.pad_token_id; without a pad_token_id, by the last column. Returns
    (loss, logits, encoded).

    Only those positions go through the head. Raises ValueError for a batch without a pad_token_id.
    """
    ops.parallel.refuse(f"{type(model).__name__}: the last token", "classify with whole sequences")
    config, input_ids = model.config, inputs.input_ids
    source = check_inputs(input_ids, inputs.inputs_embeds, model.get_input_embeddings().embedding_dim)
    (batch, length), device = source.shape[:2], source.device
    if not length:
        raise ValueError(f"input_ids: wanted at least one position to classify, got shape {tuple(source.shape)}")
    if config.pad_token_id is None and batch != 1:
        raise ValueError("Cannot handle batch sizes > 1 if no padding token is defined: set config.pad_token_id")
    last = torch.full((batch,), length - 1, device=device)
    if config.pad_token_id is not None and input_ids is not None:
        last = ((input_ids != config.pad_token_id) * torch.arange(length, device=device)).argmax(-1)
    elif config.pad_token_id is not None:
        logger.warning_once(
            f"{type(model).__name__} cannot see padding in inputs_embeds: the last column is classified"
        )
    read = torch.arange(length, device=device) == last[:, None]
    encoded = run(want=Want(read=read), **inputs.given(), **kwargs)
    logits = linear(model.score, _at(encoded, last))
    return (None if labels is None else classification_loss(config, logits, labels)), logits, encoded


def _at(encoded: Encoded, column: torch.Tensor) -> torch.Tensor:
    """The computed rows at (b, column[b]): (B, E)."""
    unpadding, rows = encoded.unpadding, encoded.rows
    batch = torch.arange(unpadding.batch, device=column.device)
    if unpadding.index is None:
        return rows[batch, column]
    return rows.index_select(0, torch.searchsorted(unpadding.index, batch * unpadding.length + column))


def double_heads(model: Any, inputs: Inputs, run: Callable, mc_token_ids, labels, mc_labels, kwargs: dict):
    """Language modelling and multiple choice on inputs (..., S): returns (loss, mc_loss, logits (..., S, V),
    mc_logits (...), encoded)."""
    ops.parallel.refuse(f"{type(model).__name__}: a choice's token", "run it on whole sequences")
    leading, flat = flatten_leading(inputs)
    source = check_inputs(flat.input_ids, flat.inputs_embeds, model.config.hidden_size)
    batch, length = source.shape[:2]
    leading = leading or source.shape[:1]
    shifted = None if labels is None else shifted_labels(labels.reshape(-1, labels.shape[-1]), None)
    read, head = is_labelled(shifted), model.multiple_choice_head
    summarised = _summarised(head.summary_type, mc_token_ids, batch, length, source.device)
    encoded = run(want=Want(read=summarised if read is None else read | summarised), **flat.given(), **kwargs)
    rows = linear(model.lm_head, encoded.rows)
    loss = mc_loss = None
    if shifted is not None:
        targets = encoded.unpadding.unpad(_like(shifted, encoded.unpadding).to(rows.device)).reshape(-1)
        loss = ops.cross_entropy(rows.reshape(-1, rows.shape[-1]), targets, ignore_index=IGNORE).to(rows.dtype)
    mc_logits = head(encoded.restored().unflatten(0, leading), mc_token_ids).squeeze(-1)
    if mc_labels is not None:
        mc_loss = F.cross_entropy(mc_logits.view(-1, mc_logits.shape[-1]), mc_labels.view(-1))
    return loss, mc_loss, encoded.unpadding.pad(rows).unflatten(0, leading), mc_logits, encoded


def _summarised(kind: str, mc_token_ids, batch: int, length: int, device) -> torch.Tensor:
    """(B, S) bool: the positions that the multiple choice head reads."""
    if kind != "cls_index":
        return torch.ones(batch, length, dtype=torch.bool, device=device)
    column = torch.full((batch,), length - 1, device=device) if mc_token_ids is None else mc_token_ids.reshape(-1)
    if column.shape[0] != batch:
        raise ValueError(
            f"mc_token_ids: wanted one index for each of the {batch} sequences, got {tuple(mc_token_ids.shape)}"
        )
    return torch.arange(length, device=device) == (column % length)[:, None]
