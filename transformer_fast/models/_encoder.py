"""What encoder families share: the pass from ids to packed rows, and the heads that read them."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import (
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from .. import ops
from ..layers import Packing, SlotTable, StackCall, TransformerSpec, documents_of, plan_call, run_layers
from ..layers.embeddings import check_indices, embed
from ..layers.projection import dropout_p, linear, norm
from ..layers.stock import as_forward_of
from ._base import Encoded, ModelMixin, Want, activation_name, check_inputs, check_integers, read_flags
from ._heads import classification_loss, is_labelled, masked_lm, per_position, span_loss, token_loss

__all__ = ["EncoderBase", "EncoderHeads", "Inputs", "VocabularyHead"]


class Inputs(NamedTuple):
    """What every encoder reads, by HF's names; shapes (B, S), inputs_embeds (B, S, E)."""

    input_ids: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    token_type_ids: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    inputs_embeds: torch.Tensor | None = None

    def given(self) -> dict[str, torch.Tensor]:
        return {name: t for name, t in self._asdict().items() if t is not None}

    def source(self) -> torch.Tensor:
        """The ids or the embeddings; ValueError where neither or both were given."""
        if (self.input_ids is None) == (self.inputs_embeds is None):
            came = "neither" if self.input_ids is None else "both"
            raise ValueError(f"input_ids, inputs_embeds: wanted exactly one of them, got {came}")
        return self.input_ids if self.inputs_embeds is None else self.inputs_embeds  # type: ignore[return-value]


class EncoderBase(ModelMixin):
    """For base models. A family says where its layers are, how they are read and what they compute."""

    _slots: SlotTable
    config: Any
    embeddings: Any
    get_input_embeddings: Any

    def _spec(self, causal: bool) -> TransformerSpec:
        config = self.config
        return TransformerSpec(
            num_heads=config.num_attention_heads,
            head_dim=config.hidden_size // config.num_attention_heads,
            causal=causal,
            activation=_activation(config),
        )

    def _layers(self) -> Iterable[nn.Module]:
        """The layer modules in the order they are called; one that is shared comes again."""
        raise NotImplementedError

    def _positions(self, inputs: Inputs, past) -> torch.Tensor | None:
        """(B or 1, S): each position's row of the table of positions; None for past, past + 1, ..."""
        return inputs.position_ids

    def _project(self, rows: torch.Tensor) -> torch.Tensor:
        """Between the embeddings and the first layer."""
        return rows

    def _relative_bias(self) -> ops.RelativeBias | None:
        """Added to the scores of every layer."""
        return None

    def _plan(self, spec: TransformerSpec, inputs: Inputs, batch: int, length: int, device, **options) -> StackCall:
        """options: of plan_call."""
        bias = self._relative_bias()
        return plan_call(spec, inputs.attention_mask, batch, length, device, relative_bias=bias, **options)

    def _embed(self, packing: Packing, inputs: Inputs, positions: torch.Tensor | None, past) -> torch.Tensor:
        """The rows that the first layer reads."""
        e = self.embeddings
        rows = embed(
            packing, e.word_embeddings, e.position_embeddings, getattr(e, "token_type_embeddings", None), e.LayerNorm,
            e.dropout, input_ids=inputs.input_ids, inputs_embeds=inputs.inputs_embeds, position_ids=positions,
            segment_ids=inputs.token_type_ids, past=past,
        )  # fmt: skip
        return self._project(rows)

    def _last(self, rows: torch.Tensor) -> torch.Tensor:
        """After the last layer."""
        return rows

    def _pool(self, first: torch.Tensor) -> torch.Tensor | None:
        """(B, E) of the first positions -> what heads on whole sequences read."""
        return first

    def _run(
        self, want: Want, inputs: Inputs, kwargs: dict, past_key_values=None, encoder_states=None, encoder_mask=None
    ) -> Encoded:
        config, layers, words = self.config, list(self._layers()), self.get_input_embeddings()
        source = check_inputs(inputs.input_ids, inputs.inputs_embeds, words.embedding_dim)
        batch, length = source.shape[:2]
        flags = read_flags(config, kwargs, len(layers))
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        positions = self._positions(inputs, past)
        _check(inputs, positions, words, self.embeddings, batch, length, past)
        causal = kwargs.get("is_causal", getattr(config, "is_causal", None))
        documents = None
        if inputs.attention_mask is None and past_key_values is None:
            documents = documents_of((batch, length), None, kwargs)
        call = self._plan(
            self._spec(bool(getattr(config, "is_decoder", False) if causal is None else causal)), inputs, batch, length,
            source.device, past_key_values=past_key_values, encoder_states=encoder_states, encoder_mask=encoder_mask,
            documents=documents, read=want.read, read_first=want.read_first or want.first_only,
            attentions=flags.attentions,
        )  # fmt: skip
        rows = as_forward_of(self.embeddings, lambda: self._embed(call.packing, inputs, positions, past))
        whole = flags.hidden_states or flags.attentions or past_key_values is not None or documents is not None
        first_only = want.first_only and not whole and call.packing.spread is None
        rows = run_layers(
            layers, rows, call, first_only=first_only, past_key_values=past_key_values, keep_hidden=flags.keep_hidden
        )
        rows, pooled = self._last(rows), None
        if want.first_only or want.read_first:
            pooled = self._pool(rows if first_only else call.packing.first(rows))
        return Encoded.of(None if first_only else rows, call, pooled, past_key_values, flags, len(layers))


def _activation(config) -> str | None:
    return activation_name(config.activation if hasattr(config, "activation") else config.hidden_act)


def _check(inputs: Inputs, positions: torch.Tensor | None, words: Any, e: Any, batch: int, length: int, past) -> None:
    table, kinds = (getattr(e, name, None) for name in ("position_embeddings", "token_type_embeddings"))
    for name, t in (("position_ids", inputs.position_ids), ("token_type_ids", inputs.token_type_ids)):
        if t is not None:
            check_integers(name, t, (batch, length))
    size = 0 if table is None else table.num_embeddings
    if table is None:
        pass
    elif inputs.position_ids is not None:
        check_indices("position_ids", inputs.position_ids, size, "config.max_position_embeddings")
    elif positions is not None:
        meaning = "config.max_position_embeddings; truncate the text: tokenizer(..., truncation=True)"
        given = "input_ids" if inputs.inputs_embeds is None else "inputs_embeds"
        check_indices(f"the positions of {given}", positions, size, meaning)
    elif isinstance(past, int) and past + length > size:
        raise ValueError(
            f"input_ids: {past + length} positions are past config.max_position_embeddings = {size}; "
            "truncate the text (tokenizer(..., truncation=True))"
        )
    if inputs.input_ids is not None:
        check_indices("input_ids", inputs.input_ids, words.num_embeddings, "config.vocab_size")
    if inputs.token_type_ids is not None and kinds is not None:
        check_indices("token_type_ids", inputs.token_type_ids, kinds.num_embeddings, "config.type_vocab_size")


class VocabularyHead(NamedTuple):
    """norm(act(x W + b)) W_vocabulary + b_vocabulary. activation: a module, of the configuration's activation; or the
    name ops.linear knows one by, for a head that has its own whatever the configuration says."""

    dense: nn.Module
    activation: Any
    norm: nn.Module
    decoder: nn.Module


class EncoderHeads(ModelMixin):
    """For models with a head: HF's outputs from packed rows, computed where they are read."""

    config: Any
    base_model: Any
    classifier: Any
    qa_outputs: Any

    def _vocabulary_head(self) -> VocabularyHead:
        raise NotImplementedError

    def _before_classifier(self, pooled: torch.Tensor) -> torch.Tensor:
        """A layer of a head's own between pooling and classifier."""
        return pooled

    def _score(self, pooled: torch.Tensor) -> torch.Tensor:
        """(B, E) -> (B, labels) of a head on whole sequences."""
        rows = ops.dropout(self._before_classifier(pooled), dropout_p(self.dropout))  # type: ignore[attr-defined, arg-type]
        return linear(self.classifier, rows)

    def _logits(self, rows: torch.Tensor) -> torch.Tensor:
        """What the head on tokens makes of rows (..., E)."""
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
        return masked_lm(self._vocabulary_head().decoder, self._transform(encoded.rows), encoded.packing, labels)

    def _masked_lm(self, inputs: Inputs, labels: torch.Tensor | None, kwargs: dict):
        labels = per_position(labels, inputs.source())
        encoded = self._encode(inputs, Want(read=is_labelled(labels)), kwargs)
        loss, logits = self._vocabulary(encoded, labels)
        return self._finish(MaskedLMOutput(loss=loss, logits=logits, **encoded.extras()), kwargs)

    def _pre_training(self, inputs: Inputs, labels, pair_label, kwargs: dict):
        """(loss when both labels are given, MLM logits, what pooled rows the pair head reads, extras)."""
        labels = per_position(labels, inputs.source())
        encoded = self._encode(inputs, Want(read_first=True, read=is_labelled(labels)), kwargs)
        masked_loss, logits = self._vocabulary(encoded, labels)
        pair_logits = self._pair_logits(encoded.pooled)
        loss = None
        if masked_loss is not None and pair_label is not None:
            loss = masked_loss + F.cross_entropy(pair_logits.view(-1, 2), pair_label.view(-1))
        return loss, logits, pair_logits, encoded.extras()

    def _pair_logits(self, pooled) -> torch.Tensor:
        """(B, 2): the score of the second sentence as the first one's successor."""
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
        logits = encoded.packing.unpack(self._logits(encoded.rows))
        loss = None if labels is None else token_loss(logits, labels)
        return self._finish(TokenClassifierOutput(loss=loss, logits=logits, **encoded.extras()), kwargs)

    def _find_spans(self, inputs: Inputs, start_positions, end_positions, kwargs: dict):
        """start_logits and end_logits at padding are the dtype's lowest number, so that no argmax picks it. With
        start_positions and end_positions padding is computed, as HF's loss counts it."""
        source = inputs.input_ids if inputs.input_ids is not None else inputs.inputs_embeds
        scored, read = start_positions is not None and end_positions is not None, None
        if scored and source is not None:
            read = torch.ones(source.shape[:2], dtype=torch.bool, device=source.device)
        encoded = self._encode(inputs, Want(read=read), kwargs)
        logits = self._logits(encoded.rows)
        logits = encoded.packing.unpack(logits, fill=torch.finfo(logits.dtype).min)
        start, end = (t.squeeze(-1).contiguous() for t in logits.split(1, dim=-1))
        loss = self._span_loss(start, end, start_positions, end_positions, kwargs) if scored else None
        return self._finish(
            QuestionAnsweringModelOutput(loss=loss, start_logits=start, end_logits=end, **encoded.extras()), kwargs
        )
