"""BERT and multilingual BERT (Devlin et al., 2019), every head: HF's parameters and names, our computation."""

from typing import Any

import torch
import torch.nn.functional as F
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    NextSentencePredictorOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.models.bert import modeling_bert as hf
from transformers.utils import logging

from .. import ops
from ..generation import GenerationMixin
from ..layers import Packing, SlotTable, TransformerSpec, encoder_layer, plan_call, run_layers
from ..layers.embeddings import check_indices, embed
from ..layers.projection import dropout_p, lay_out, linear, norm
from ._base import (
    Adopted,
    Encoded,
    ModelMixin,
    Want,
    activation_name,
    check_inputs,
    check_integers,
    documented_as,
    read_flags,
)
from ._heads import (
    IGNORE,
    classification_loss,
    is_labelled,
    masked_lm,
    span_loss,
    token_loss,
    vocabulary_logits,
)

__all__ = [
    "BertForMaskedLM",
    "BertForMultipleChoice",
    "BertForNextSentencePrediction",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertLMHeadModel",
    "BertModel",
]

SLOTS = SlotTable(
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    attention_dropout="attention.self.dropout",
    attention_output="attention.output.dense",
    attention_output_dropout="attention.output.dropout",
    attention_norm="attention.output.LayerNorm",
    cross_query="crossattention.self.query",
    cross_key="crossattention.self.key",
    cross_value="crossattention.self.value",
    cross_dropout="crossattention.self.dropout",
    cross_output="crossattention.output.dense",
    cross_output_dropout="crossattention.output.dropout",
    cross_norm="crossattention.output.LayerNorm",
    up="intermediate.dense",
    activation_fn="intermediate.intermediate_act_fn",
    down="output.dense",
    output_dropout="output.dropout",
    output_norm="output.LayerNorm",
)
_ADOPTED = Adopted()
logger = logging.get_logger(__name__)


def spec_of(config, causal: bool) -> TransformerSpec:
    return TransformerSpec(
        num_heads=config.num_attention_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        causal=causal,
        activation=activation_name(config.hidden_act),
    )


@_ADOPTED.register
class BertLayer(hf.BertLayer):
    """One layer on packed rows: (total, E), or (B, S, E) when nothing is padding."""

    def forward(self, hidden_states, call, index, first_only=False, past_key_values=None):
        return encoder_layer(SLOTS.read(self), hidden_states, call, index, first_only, past_key_values)


class _BertMixin(ModelMixin):
    _adopted = _ADOPTED
    config: Any

    def _transform(self, head: Any, rows: torch.Tensor) -> torch.Tensor:
        """norm(act(x W + b)), before the vocabulary projection."""
        transform, name = head.transform, activation_name(self.config.hidden_act)
        rows = linear(transform.dense, rows, name)
        return norm(transform.LayerNorm, rows if name else transform.transform_act_fn(rows))


@_ADOPTED.register
class BertModel(_BertMixin, hf.BertModel):
    __doc__ = hf.BertModel.__doc__

    @documented_as(hf.BertModel.forward)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        past_key_values=None,
        use_cache: bool | None = None,
        **kwargs,
    ):
        want = kwargs.pop("want", None)  # given by our heads, which read packed rows
        encoded = self._run(
            want or Want(read_first=self.pooler is not None), input_ids, attention_mask, token_type_ids, position_ids,
            inputs_embeds, encoder_hidden_states, encoder_attention_mask, past_key_values, use_cache, kwargs,
        )  # fmt: skip
        if want is not None:
            return encoded
        output = BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=encoded.restored(),
            pooler_output=encoded.pooled,
            past_key_values=encoded.past_key_values,
            **encoded.extras(cross=True),
        )
        return self._finish(output, kwargs)

    def _run(
        self, want: Want, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, encoder_states,
        encoder_mask, past_key_values, use_cache, kwargs,
    ) -> Encoded:  # fmt: skip
        config, layers = self.config, self.encoder.layer
        source = check_inputs(input_ids, inputs_embeds, config.hidden_size)
        batch, length = source.shape[:2]
        flags = read_flags(config, kwargs, len(layers))
        past_key_values, use_cache = self._cache(past_key_values, use_cache, encoder_states)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        self._check(input_ids, token_type_ids, position_ids, batch, length, past)
        causal = kwargs.get("is_causal", getattr(config, "is_causal", None))
        call = plan_call(
            spec_of(config, bool(config.is_decoder if causal is None else causal)),
            attention_mask, batch, length, source.device,
            past_key_values=past_key_values, encoder_states=encoder_states if config.is_decoder else None,
            encoder_mask=encoder_mask, read=want.read, read_first=want.read_first or want.first_only,
            attentions=flags.attentions,
        )  # fmt: skip
        if not torch.compiler.is_compiling():
            lay_out(SLOTS.read(layer) for layer in layers)
        e = self.embeddings
        rows = embed(
            call.packing, e.word_embeddings, e.position_embeddings, e.token_type_embeddings, e.LayerNorm, e.dropout,
            input_ids=input_ids, inputs_embeds=inputs_embeds, position_ids=position_ids, segment_ids=token_type_ids,
            past=past,
        )  # fmt: skip
        first_only = want.first_only and not (flags.hidden_states or flags.attentions or past_key_values is not None)
        rows = run_layers(
            layers, rows, call, first_only=first_only, past_key_values=past_key_values, keep_hidden=flags.keep_hidden
        )
        pooled = None
        if self.pooler is not None:
            pooled = self.pooler.activation(linear(self.pooler.dense, rows if first_only else call.packing.first(rows)))
        return Encoded.of(
            None if first_only else rows, call, pooled, past_key_values if use_cache else None, flags, len(layers)
        )

    def _cache(self, past_key_values, use_cache, encoder_states):
        """HF's rule for when a decoder makes and returns a cache."""
        config = self.config
        if not config.is_decoder:
            return past_key_values, False
        use_cache = config.use_cache if use_cache is None else use_cache
        if use_cache and self.gradient_checkpointing and self.training:
            logger.warning_once("use_cache=True does not go with gradient checkpointing: use_cache=False is used.")
            return None, False
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=config)
            if encoder_states is not None or config.is_encoder_decoder:
                past_key_values = EncoderDecoderCache(past_key_values, DynamicCache(config=config))
        return past_key_values, use_cache

    def _check(self, input_ids, token_type_ids, position_ids, batch: int, length: int, past) -> None:
        config, e = self.config, self.embeddings
        positions = e.position_embeddings.num_embeddings
        for name, t in (("position_ids", position_ids), ("token_type_ids", token_type_ids)):
            if t is not None:
                check_integers(name, t, (batch, length))
        if position_ids is not None:
            check_indices("position_ids", position_ids, positions, "config.max_position_embeddings")
        elif isinstance(past, int) and past + length > positions:
            raise ValueError(
                f"input_ids: {past + length} positions are past config.max_position_embeddings = {positions}; "
                "truncate the text (tokenizer(..., truncation=True))"
            )
        if input_ids is not None:
            check_indices("input_ids", input_ids, e.word_embeddings.num_embeddings, "config.vocab_size")
        if token_type_ids is not None:
            check_indices("token_type_ids", token_type_ids, config.type_vocab_size, "config.type_vocab_size")


class BertForPreTraining(_BertMixin, hf.BertForPreTraining):
    __doc__ = hf.BertForPreTraining.__doc__

    @documented_as(hf.BertForPreTraining.forward)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        next_sentence_label: torch.Tensor | None = None,
        **kwargs,
    ):
        encoded = self.bert(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            want=Want(read_first=True, read=is_labelled(labels)),
            **kwargs,
        )
        head = self.cls.predictions
        masked_loss, logits = masked_lm(head.decoder, self._transform(head, encoded.rows), encoded.packing, labels)
        relation = linear(self.cls.seq_relationship, encoded.pooled)
        loss = None
        if masked_loss is not None and next_sentence_label is not None:
            loss = masked_loss + F.cross_entropy(relation.view(-1, 2), next_sentence_label.view(-1))
        return self._finish(
            hf.BertForPreTrainingOutput(
                loss=loss, prediction_logits=logits, seq_relationship_logits=relation, **encoded.extras()
            ),
            kwargs,
        )


class BertForMaskedLM(_BertMixin, hf.BertForMaskedLM):
    __doc__ = hf.BertForMaskedLM.__doc__

    @documented_as(hf.BertForMaskedLM.forward)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ):
        encoded = self.bert(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, encoder_hidden_states,
            encoder_attention_mask, want=Want(read=is_labelled(labels)), **kwargs,
        )  # fmt: skip
        head = self.cls.predictions
        loss, logits = masked_lm(head.decoder, self._transform(head, encoded.rows), encoded.packing, labels)
        return self._finish(MaskedLMOutput(loss=loss, logits=logits, **encoded.extras()), kwargs)


class BertLMHeadModel(GenerationMixin, _BertMixin, hf.BertLMHeadModel):
    __doc__ = hf.BertLMHeadModel.__doc__

    @documented_as(hf.BertLMHeadModel.forward)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        past_key_values=None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ):
        shifted = kwargs.get("shift_labels")
        if labels is not None:
            use_cache = False
            if shifted is None:  # position i is scored on the token after it
                shifted = F.pad(labels, (0, 1), value=IGNORE)[..., 1:]
        encoded = self.bert(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, encoder_hidden_states,
            encoder_attention_mask, past_key_values, use_cache, want=Want(read=is_labelled(shifted)), **kwargs,
        )  # fmt: skip
        rows, packing = encoded.rows, encoded.packing
        if not isinstance(logits_to_keep, int) or logits_to_keep:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            rows = packing.unpack(rows)[:, kept]
            packing = Packing(*rows.shape[:2])
        head = self.cls.predictions
        logits = vocabulary_logits(head.decoder, self._transform(head, rows), packing)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return self._finish(
            CausalLMOutputWithCrossAttentions(
                loss=loss, logits=logits, past_key_values=encoded.past_key_values, **encoded.extras(cross=True)
            ),
            kwargs,
        )


class BertForNextSentencePrediction(_BertMixin, hf.BertForNextSentencePrediction):
    __doc__ = hf.BertForNextSentencePrediction.__doc__

    @documented_as(hf.BertForNextSentencePrediction.forward)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ):
        encoded = self.bert(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, want=Want(first_only=True), **kwargs
        )
        logits = linear(self.cls.seq_relationship, encoded.pooled)
        loss = None if labels is None else F.cross_entropy(logits.view(-1, 2), labels.view(-1))
        return self._finish(NextSentencePredictorOutput(loss=loss, logits=logits, **encoded.extras()), kwargs)


class BertForSequenceClassification(_BertMixin, hf.BertForSequenceClassification):
    __doc__ = hf.BertForSequenceClassification.__doc__

    @documented_as(hf.BertForSequenceClassification.forward)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ):
        encoded = self.bert(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, want=Want(first_only=True), **kwargs
        )
        logits = linear(self.classifier, ops.dropout(encoded.pooled, dropout_p(self.dropout)))
        loss = None if labels is None else classification_loss(self.config, logits, labels)
        return self._finish(SequenceClassifierOutput(loss=loss, logits=logits, **encoded.extras()), kwargs)


class BertForMultipleChoice(_BertMixin, hf.BertForMultipleChoice):
    __doc__ = hf.BertForMultipleChoice.__doc__

    @documented_as(hf.BertForMultipleChoice.forward)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ):
        source = input_ids if input_ids is not None else inputs_embeds
        choices = source.shape[1] if source is not None else 1
        input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds = (
            None if t is None else t.flatten(0, 1)
            for t in (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        )
        encoded = self.bert(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, want=Want(first_only=True), **kwargs
        )
        logits = linear(self.classifier, ops.dropout(encoded.pooled, dropout_p(self.dropout))).view(-1, choices)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return self._finish(MultipleChoiceModelOutput(loss=loss, logits=logits, **encoded.extras()), kwargs)


class BertForTokenClassification(_BertMixin, hf.BertForTokenClassification):
    __doc__ = hf.BertForTokenClassification.__doc__

    @documented_as(hf.BertForTokenClassification.forward)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ):
        encoded = self.bert(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            want=Want(read=is_labelled(labels)),
            **kwargs,
        )
        rows = ops.dropout(encoded.rows, dropout_p(self.dropout))
        logits = encoded.packing.unpack(linear(self.classifier, rows))
        loss = None if labels is None else token_loss(logits, labels)
        return self._finish(TokenClassifierOutput(loss=loss, logits=logits, **encoded.extras()), kwargs)


class BertForQuestionAnswering(_BertMixin, hf.BertForQuestionAnswering):
    __doc__ = hf.BertForQuestionAnswering.__doc__

    @documented_as(hf.BertForQuestionAnswering.forward)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        **kwargs,
    ):
        """As HF's, padding dropped; start_logits and end_logits at padding are the dtype's lowest number, so that no
        argmax picks it. With start_positions and end_positions padding is computed, as HF's loss counts it."""
        source = check_inputs(input_ids, inputs_embeds, self.config.hidden_size)
        scored = start_positions is not None and end_positions is not None
        read = torch.ones(source.shape[:2], dtype=torch.bool, device=source.device) if scored else None
        encoded = self.bert(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, want=Want(read=read), **kwargs
        )
        logits = linear(self.qa_outputs, encoded.rows)
        logits = encoded.packing.unpack(logits, fill=torch.finfo(logits.dtype).min)
        start, end = (t.squeeze(-1).contiguous() for t in logits.split(1, dim=-1))
        loss = span_loss(start, end, start_positions, end_positions) if scored else None
        return self._finish(
            QuestionAnsweringModelOutput(loss=loss, start_logits=start, end_logits=end, **encoded.extras()), kwargs
        )
