"""Code that encoder families share: the base model, and heads that read unpadded rows."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from .. import ops
from ..layers import TransformerSpec, Unpadding
from ..layers.embeddings import embed
from ..layers.projection import dropout_p, linear, norm
from ._base import Encoded, ModelMixin, Want, activation_name
from ._heads import (
    classification_loss,
    every_position,
    is_labelled,
    masked_lm,
    per_position,
    span_loss,
    span_scores,
    token_loss,
)
from ._run_stack import Inputs, Stack, run_stack

__all__ = ["EncoderBase", "EncoderHeads", "VocabularyHead"]


class EncoderBase(Stack, ModelMixin):
    """For base models. Most families keep their embedding tables in `embeddings`, under BERT's names."""

    embeddings: Any
    pooler: Any

    def _spec(self, causal: bool) -> TransformerSpec:
        config = self.config
        return TransformerSpec(
            num_heads=config.num_attention_heads,
            head_dim=config.hidden_size // config.num_attention_heads,
            causal=causal,
            activation=_activation(config),
        )

    def _embedding_module(self) -> nn.Module:
        return self.embeddings

    def _project(self, rows: torch.Tensor) -> torch.Tensor:
        """Applied between the embeddings and the first layer."""
        return rows

    def _most_positions(self) -> int | None:
        table = getattr(self.embeddings, "position_embeddings", None)
        return None if table is None else table.num_embeddings

    def _segments(self) -> tuple[int, str] | None:
        table = getattr(self.embeddings, "token_type_embeddings", None)
        return None if table is None else (table.num_embeddings, "config.type_vocab_size")

    def _embed(self, unpadding: Unpadding, inputs: Inputs, positions: torch.Tensor | None, past) -> torch.Tensor:
        e = self.embeddings
        rows = embed(
            unpadding, e.word_embeddings, e.position_embeddings, getattr(e, "token_type_embeddings", None), e.LayerNorm,
            e.dropout, input_ids=inputs.input_ids, inputs_embeds=inputs.inputs_embeds, position_ids=positions,
            segment_ids=inputs.token_type_ids, past=past,
        )  # fmt: skip
        return self._project(rows)

    def _base_forward(self, inputs: Inputs, kwargs: dict, *, pools: bool = False):
        """A base model's forward: returns Encoded when one of our heads calls, else HF's output. pools: its output
        class has a pooler_output."""
        want = kwargs.pop("want", None)  # passed by our heads, which read unpadded rows
        encoded = run_stack(
            self, inputs, want or Want(read_first=pools and self.pooler is not None, returned=pools), kwargs
        )
        if want is not None:
            return encoded
        shared = {"last_hidden_state": encoded.restored(), **encoded.extras()}
        output = (
            BaseModelOutputWithPooling(pooler_output=encoded.pooled, **shared) if pools else BaseModelOutput(**shared)
        )
        return self._finish(output, kwargs)


def _activation(config) -> str | None:
    return activation_name(config.activation if hasattr(config, "activation") else config.hidden_act)


class VocabularyHead(NamedTuple):
    """norm(act(x W + b)) W_vocabulary + b_vocabulary. activation: a module for the configuration's activation, or a
    name that ops.linear takes, for a head whose activation is fixed."""

    dense: nn.Module
    activation: Any
    norm: nn.Module
    decoder: nn.Module


class EncoderHeads(ModelMixin):
    """For models with a head: HF's outputs from unpadded rows, computed only at the positions that are read."""

    config: Any
    base_model: Any
    classifier: Any
    qa_outputs: Any

    def _vocabulary_head(self) -> VocabularyHead:
        raise NotImplementedError

    def _before_classifier(self, pooled: torch.Tensor) -> torch.Tensor:
        """Applied between pooling and classifier, in heads that have a layer there."""
        return pooled

    def _score(self, pooled: torch.Tensor) -> torch.Tensor:
        """Logits of a head on whole sequences: (B, E) -> (B, labels)."""
        rows = ops.dropout(self._before_classifier(pooled), dropout_p(self.dropout))  # type: ignore[attr-defined, arg-type]
        return linear(self.classifier, rows)

    def _logits(self, rows: torch.Tensor) -> torch.Tensor:
        """Logits of a head on tokens: (..., E) -> (..., labels)."""
        head = self.qa_outputs if hasattr(self, "qa_outputs") else self.classifier
        return linear(head, ops.dropout(rows, dropout_p(getattr(self, "dropout", None))))

    def _span_loss(self, start, end, start_positions, end_positions, kwargs: dict) -> torch.Tensor:
        return span_loss(start, end, start_positions, end_positions)

    def _encode(self, inputs: Inputs, want: Want, kwargs: dict) -> Encoded:
        return self.base_model(**inputs.given(), want=want, **kwargs)

    def _transform(self, rows: torch.Tensor) -> torch.Tensor:
        head = self._vocabulary_head()
        name = head.activation if isinstance(head.activation, str) else _activation(self.config)
        rows = linear(head.dense, rows, name)
        return norm(head.norm, rows if name else head.activation(rows))

    def _vocabulary(self, encoded: Encoded, labels: torch.Tensor | None):
        """(loss or None, logits (B, S, V))."""
        return masked_lm(self._vocabulary_head().decoder, self._transform(encoded.rows), encoded.unpadding, labels)

    def _masked_lm(self, inputs: Inputs, labels: torch.Tensor | None, kwargs: dict):
        labels = per_position(labels, inputs.source())
        encoded = self._encode(inputs, Want(read=is_labelled(labels)), kwargs)
        loss, logits = self._vocabulary(encoded, labels)
        return self._finish(MaskedLMOutput(loss=loss, logits=logits, **encoded.extras()), kwargs)

    def _pre_training(self, inputs: Inputs, labels, pair_label, kwargs: dict):
        """(loss when both labels are given, MLM logits, logits of the pair head, extras)."""
        labels = per_position(labels, inputs.source())
        encoded = self._encode(inputs, Want(read_first=True, read=is_labelled(labels)), kwargs)
        masked_loss, logits = self._vocabulary(encoded, labels)
        pair_logits = self._pair_logits(encoded.pooled)
        loss = None
        if masked_loss is not None and pair_label is not None:
            loss = masked_loss + F.cross_entropy(pair_logits.view(-1, 2), pair_label.view(-1))
        return loss, logits, pair_logits, encoded.extras()

    def _pair_logits(self, pooled) -> torch.Tensor:
        """(B, 2): whether the second sentence follows the first one."""
        raise NotImplementedError

    def _pooled_logits(self, inputs: Inputs, kwargs: dict) -> tuple[torch.Tensor, Encoded]:
        encoded = self._encode(inputs, Want(first_only=True), kwargs)
        return self._score(encoded.pooled), encoded  # type: ignore[arg-type]

    def _classify_sequences(self, inputs: Inputs, labels: torch.Tensor | None, kwargs: dict):
        logits, encoded = self._pooled_logits(inputs, kwargs)
        loss = None if labels is None else classification_loss(self.config, logits, labels)
        return self._finish(SequenceClassifierOutput(loss=loss, logits=logits, **encoded.extras()), kwargs)

    def _choose(self, inputs: Inputs, labels: torch.Tensor | None, kwargs: dict):
        """inputs (B, choices, S) -> logits (B, choices)."""
        source = inputs.input_ids if inputs.input_ids is not None else inputs.inputs_embeds
        choices = source.shape[1] if source is not None else 1
        flat = Inputs(**{name: t.flatten(0, 1) if t.dim() > 2 else t for name, t in inputs.given().items()})
        logits, encoded = self._pooled_logits(flat, kwargs)
        logits = logits.view(-1, choices)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return self._finish(MultipleChoiceModelOutput(loss=loss, logits=logits, **encoded.extras()), kwargs)

    def _classify_tokens(self, inputs: Inputs, labels: torch.Tensor | None, kwargs: dict):
        labels = per_position(labels, inputs.source())
        encoded = self._encode(inputs, Want(read=is_labelled(labels)), kwargs)
        logits = encoded.unpadding.pad(self._logits(encoded.rows))
        loss = None if labels is None else token_loss(logits, labels)
        return self._finish(TokenClassifierOutput(loss=loss, logits=logits, **encoded.extras()), kwargs)

    def _find_spans(self, inputs: Inputs, start_positions, end_positions, kwargs: dict):
        """start_logits and end_logits at padding are the dtype's lowest number, so that no argmax picks it. With
        start_positions and end_positions padding is computed, because HF's loss includes it."""
        source = inputs.input_ids if inputs.input_ids is not None else inputs.inputs_embeds
        scored, read = start_positions is not None and end_positions is not None, None
        if scored and source is not None:
            read = every_position(source)
        encoded = self._encode(inputs, Want(read=read), kwargs)
        start, end = span_scores(self._logits(encoded.rows), encoded.unpadding)
        loss = self._span_loss(start, end, start_positions, end_positions, kwargs) if scored else None
        return self._finish(
            QuestionAnsweringModelOutput(loss=loss, start_logits=start, end_logits=end, **encoded.extras()), kwargs
        )
