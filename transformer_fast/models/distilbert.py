"""DistilBERT (Sanh et al., 2019), every head: HF's parameters and names, our computation."""

from typing import Any

import torch
from transformers.models.distilbert import modeling_distilbert as hf

from ..layers import SlotTable
from ..layers.projection import linear
from ._base import Adopted
from ._encoder import EncoderBase, EncoderHeads, VocabularyHead
from ._forward import public_forward
from ._head_forwards import labelled_without_types, spans_without_types
from ._layer import AttentionModule, Layer
from ._run_stack import Inputs

__all__ = [
    "DistilBertForMaskedLM",
    "DistilBertForMultipleChoice",
    "DistilBertForQuestionAnswering",
    "DistilBertForSequenceClassification",
    "DistilBertForTokenClassification",
    "DistilBertModel",
]

SLOTS = SlotTable(
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    attention_dropout="attention.dropout",
    attention_output="attention.out_lin",
    attention_norm="sa_layer_norm",
    up="ffn.lin1",
    activation_fn="ffn.activation",
    down="ffn.lin2",
    output_dropout="ffn.dropout",
    output_norm="output_layer_norm",
)
_ADOPTED = Adopted()


@_ADOPTED.register
class TransformerBlock(Layer, hf.TransformerBlock):
    _table = SLOTS


@_ADOPTED.register
class DistilBertSelfAttention(AttentionModule, hf.DistilBertSelfAttention):
    pass


class _DistilBertHeads(EncoderHeads):
    _adopted = _ADOPTED
    activation: Any
    pre_classifier: Any
    vocab_transform: Any
    vocab_layer_norm: Any
    vocab_projector: Any

    def _vocabulary_head(self) -> VocabularyHead:
        return VocabularyHead(self.vocab_transform, self.activation, self.vocab_layer_norm, self.vocab_projector)

    def _before_classifier(self, pooled: torch.Tensor) -> torch.Tensor:
        return linear(self.pre_classifier, pooled, "relu")


@_ADOPTED.register
class DistilBertModel(EncoderBase, hf.DistilBertModel):
    __doc__ = hf.DistilBertModel.__doc__
    _adopted = _ADOPTED

    @public_forward(hf.DistilBertModel.forward)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs,
    ):
        inputs = Inputs(input_ids, attention_mask, None, position_ids, inputs_embeds)
        return self._base_forward(inputs, kwargs)

    def _layers(self):
        return self.transformer.layer

    def _pool(self, first: torch.Tensor) -> torch.Tensor | None:
        return first


class DistilBertForMaskedLM(_DistilBertHeads, hf.DistilBertForMaskedLM):
    __doc__ = hf.DistilBertForMaskedLM.__doc__
    forward = labelled_without_types(hf.DistilBertForMaskedLM, EncoderHeads._masked_lm)


class DistilBertForSequenceClassification(_DistilBertHeads, hf.DistilBertForSequenceClassification):
    __doc__ = hf.DistilBertForSequenceClassification.__doc__
    forward = labelled_without_types(hf.DistilBertForSequenceClassification, EncoderHeads._classify_sequences)


class DistilBertForMultipleChoice(_DistilBertHeads, hf.DistilBertForMultipleChoice):
    __doc__ = hf.DistilBertForMultipleChoice.__doc__
    forward = labelled_without_types(hf.DistilBertForMultipleChoice, EncoderHeads._choose)


class DistilBertForTokenClassification(_DistilBertHeads, hf.DistilBertForTokenClassification):
    __doc__ = hf.DistilBertForTokenClassification.__doc__
    forward = labelled_without_types(hf.DistilBertForTokenClassification, EncoderHeads._classify_tokens)


class DistilBertForQuestionAnswering(_DistilBertHeads, hf.DistilBertForQuestionAnswering):
    __doc__ = hf.DistilBertForQuestionAnswering.__doc__
    forward = spans_without_types(hf.DistilBertForQuestionAnswering)
