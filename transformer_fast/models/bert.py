"""BERT and multilingual BERT (Devlin et al., 2019), every head: HF's parameters and names, our computation."""

from typing import Any

import torch
import torch.nn.functional as F
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
    NextSentencePredictorOutput,
)
from transformers.models.bert import modeling_bert as hf
from transformers.utils import logging

from .._transformers import cached
from ..generation import GenerationMixin
from ..layers import Packing, SlotTable
from ..layers.projection import linear
from ._base import Adopted, Want, check_inputs
from ._encoder import EncoderBase, EncoderHeads, Inputs, VocabularyHead
from ._forward import public_forward
from ._head_forwards import labelled, spans
from ._heads import IGNORE, kept_positions, vocabulary_logits
from ._layer import AttentionModule, Layer

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


@_ADOPTED.register
class BertLayer(Layer, hf.BertLayer):
    _table = SLOTS


@_ADOPTED.register
class BertSelfAttention(AttentionModule, hf.BertSelfAttention):
    pass


@_ADOPTED.register
class BertCrossAttention(AttentionModule, hf.BertCrossAttention):
    pass


class _BertHeads(EncoderHeads):
    _adopted = _ADOPTED
    bert: Any
    cls: Any

    def _vocabulary_head(self) -> VocabularyHead:
        head = self.cls.predictions
        transform = head.transform
        return VocabularyHead(transform.dense, transform.transform_act_fn, transform.LayerNorm, head.decoder)

    def _pair_logits(self, pooled) -> torch.Tensor:
        return linear(self.cls.seq_relationship, pooled)


@_ADOPTED.register
class BertModel(EncoderBase, hf.BertModel):
    __doc__ = hf.BertModel.__doc__
    _adopted = _ADOPTED
    _slots = SLOTS

    @public_forward(hf.BertModel.forward)
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
        past_key_values, use_cache = self._cache(past_key_values, use_cache, encoder_hidden_states)
        encoded = self._run(
            want or Want(read_first=self.pooler is not None),
            Inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds), kwargs, past_key_values,
            encoder_hidden_states if self.config.is_decoder else None, encoder_attention_mask,
        )  # fmt: skip
        if not use_cache:
            encoded = encoded._replace(past_key_values=None)
        if want is not None:
            return encoded
        output = BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=encoded.restored(),
            pooler_output=encoded.pooled,
            **cached(encoded.past_key_values),
            **encoded.extras(cross=True),
        )
        return self._finish(output, kwargs)

    def _layers(self):
        return self.encoder.layer

    def _pool(self, first: torch.Tensor) -> torch.Tensor | None:
        if self.pooler is None:
            return None
        return self.pooler.activation(linear(self.pooler.dense, first))

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


class BertForPreTraining(_BertHeads, hf.BertForPreTraining):
    __doc__ = hf.BertForPreTraining.__doc__

    @public_forward(hf.BertForPreTraining.forward)
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
        inputs = Inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        loss, logits, relation, extras = self._pre_training(inputs, labels, next_sentence_label, kwargs)
        output = hf.BertForPreTrainingOutput(
            loss=loss, prediction_logits=logits, seq_relationship_logits=relation, **extras
        )
        return self._finish(output, kwargs)


class BertForMaskedLM(_BertHeads, hf.BertForMaskedLM):
    __doc__ = hf.BertForMaskedLM.__doc__

    @public_forward(hf.BertForMaskedLM.forward)
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
        inputs = Inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        cross = {"encoder_hidden_states": encoder_hidden_states, "encoder_attention_mask": encoder_attention_mask}
        return self._masked_lm(inputs, labels, kwargs | cross)


class BertLMHeadModel(GenerationMixin, _BertHeads, hf.BertLMHeadModel):
    __doc__ = hf.BertLMHeadModel.__doc__

    @public_forward(hf.BertLMHeadModel.forward)
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
        inputs = Inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        cross = {"encoder_hidden_states": encoder_hidden_states, "encoder_attention_mask": encoder_attention_mask}
        stored = {"past_key_values": past_key_values, "use_cache": use_cache}
        source = check_inputs(input_ids, inputs_embeds, self.config.hidden_size)
        read = kept_positions(source, logits_to_keep, shifted)
        encoded = self._encode(inputs, Want(read=read), kwargs | cross | stored)
        rows, packing = encoded.rows, encoded.packing
        if not isinstance(logits_to_keep, int) or logits_to_keep:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            rows = packing.unpack(rows)[:, kept]
            packing = Packing(*rows.shape[:2])
        logits = vocabulary_logits(self._vocabulary_head().decoder, self._transform(rows), packing)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return self._finish(
            CausalLMOutputWithCrossAttentions(
                loss=loss, logits=logits, **cached(encoded.past_key_values), **encoded.extras(cross=True)
            ),
            kwargs,
        )


class BertForNextSentencePrediction(_BertHeads, hf.BertForNextSentencePrediction):
    __doc__ = hf.BertForNextSentencePrediction.__doc__

    @public_forward(hf.BertForNextSentencePrediction.forward)
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
        inputs = Inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        encoded = self._encode(inputs, Want(first_only=True), kwargs)
        logits = self._pair_logits(encoded.pooled)
        loss = None if labels is None else F.cross_entropy(logits.view(-1, 2), labels.view(-1))
        return self._finish(NextSentencePredictorOutput(loss=loss, logits=logits, **encoded.extras()), kwargs)


class BertForSequenceClassification(_BertHeads, hf.BertForSequenceClassification):
    __doc__ = hf.BertForSequenceClassification.__doc__
    forward = labelled(hf.BertForSequenceClassification, EncoderHeads._classify_sequences)


class BertForMultipleChoice(_BertHeads, hf.BertForMultipleChoice):
    __doc__ = hf.BertForMultipleChoice.__doc__
    forward = labelled(hf.BertForMultipleChoice, EncoderHeads._choose)


class BertForTokenClassification(_BertHeads, hf.BertForTokenClassification):
    __doc__ = hf.BertForTokenClassification.__doc__
    forward = labelled(hf.BertForTokenClassification, EncoderHeads._classify_tokens)


class BertForQuestionAnswering(_BertHeads, hf.BertForQuestionAnswering):
    __doc__ = hf.BertForQuestionAnswering.__doc__
    forward = spans(hf.BertForQuestionAnswering)
