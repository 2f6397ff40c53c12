"""BERT and multilingual BERT (Devlin et al., 2019), every head: HF's parameters and names, our computation."""

from typing import Any

import torch
import torch.nn.functional as F
from transformers.modeling_outputs import NextSentencePredictorOutput
from transformers.models.bert import modeling_bert as hf

from ..generation import GenerationMixin
from ..layers.projection import linear
from ._base import Adopted, Want
from ._bert import SLOTS, BertBase, base_forward, causal_forward, masked_lm_forward
from ._encoder import EncoderHeads, VocabularyHead
from ._forward import public_forward
from ._head_forwards import labelled, spans
from ._layer import AttentionModule, Layer
from ._run_stack import Inputs

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

_ADOPTED = Adopted()


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
class BertModel(BertBase, hf.BertModel):
    __doc__ = hf.BertModel.__doc__
    _adopted = _ADOPTED
    forward = base_forward(hf.BertModel)


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
    forward = masked_lm_forward(hf.BertForMaskedLM)


class BertLMHeadModel(GenerationMixin, _BertHeads, hf.BertLMHeadModel):
    __doc__ = hf.BertLMHeadModel.__doc__
    forward = causal_forward(hf.BertLMHeadModel)


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
