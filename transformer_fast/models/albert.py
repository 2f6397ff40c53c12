"""ALBERT (Lan et al., 2020), every head: layers shared in groups, factorised embeddings; HF's parameters and names."""

from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.albert import modeling_albert as hf

from .. import ops
from ..layers import SlotTable
from ..layers.projection import dropout_p, linear
from ._base import Adopted
from ._encoder import EncoderBase, EncoderHeads, VocabularyHead
from ._forward import public_forward
from ._head_forwards import labelled, spans
from ._layer import AttentionModule, Layer
from ._run_stack import Inputs

__all__ = [
    "AlbertForMaskedLM",
    "AlbertForMultipleChoice",
    "AlbertForPreTraining",
    "AlbertForQuestionAnswering",
    "AlbertForSequenceClassification",
    "AlbertForTokenClassification",
    "AlbertModel",
]

SLOTS = SlotTable(
    query="attention.query",
    key="attention.key",
    value="attention.value",
    attention_dropout="attention.attention_dropout",
    attention_output="attention.dense",
    attention_output_dropout="attention.output_dropout",
    attention_norm="attention.LayerNorm",
    up="ffn",
    activation_fn="activation",
    down="ffn_output",
    output_norm="full_layer_layer_norm",
)
_ADOPTED = Adopted()


@_ADOPTED.register
class AlbertLayer(Layer, hf.AlbertLayer, GradientCheckpointingLayer):
    """A shared layer. (HF's layer has a dropout module for the feed-forward block and does not apply it; so neither
    does this one.)"""

    _table = SLOTS


@_ADOPTED.register
class AlbertAttention(AttentionModule, hf.AlbertAttention):
    pass


class _AlbertHeads(EncoderHeads):
    _adopted = _ADOPTED
    supports_gradient_checkpointing = True
    predictions: Any
    sop_classifier: Any

    def _vocabulary_head(self) -> VocabularyHead:
        head = self.predictions
        return VocabularyHead(head.dense, head.activation, head.LayerNorm, head.decoder)

    def _pair_logits(self, pooled) -> torch.Tensor:
        head = self.sop_classifier
        return linear(head.classifier, ops.dropout(pooled, dropout_p(head.dropout)))


@_ADOPTED.register
class AlbertModel(EncoderBase, hf.AlbertModel):
    __doc__ = hf.AlbertModel.__doc__
    _adopted = _ADOPTED
    supports_gradient_checkpointing = True  # HF's ALBERT does not support it

    @public_forward(hf.AlbertModel.forward)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs,
    ):
        inputs = Inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        return self._base_forward(inputs, kwargs, pools=True)

    def _layers(self):
        """num_hidden_layers steps over num_hidden_groups groups, each with inner_group_num layers."""
        calls, groups = self.config.num_hidden_layers, self.encoder.albert_layer_groups
        for i in range(calls):
            yield from groups[int(i / (calls / len(groups)))].albert_layers

    def _project(self, rows: torch.Tensor) -> torch.Tensor:
        return linear(self.encoder.embedding_hidden_mapping_in, rows)

    def _pool(self, first: torch.Tensor) -> torch.Tensor | None:
        return None if self.pooler is None else self.pooler_activation(linear(self.pooler, first))


class AlbertForPreTraining(_AlbertHeads, hf.AlbertForPreTraining):
    __doc__ = hf.AlbertForPreTraining.__doc__

    @public_forward(hf.AlbertForPreTraining.forward)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        sentence_order_label: torch.Tensor | None = None,
        **kwargs,
    ):
        inputs = Inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        loss, logits, order, extras = self._pre_training(inputs, labels, sentence_order_label, kwargs)
        output = hf.AlbertForPreTrainingOutput(loss=loss, prediction_logits=logits, sop_logits=order, **extras)
        return self._finish(output, kwargs)


class AlbertForMaskedLM(_AlbertHeads, hf.AlbertForMaskedLM):
    __doc__ = hf.AlbertForMaskedLM.__doc__
    forward = labelled(hf.AlbertForMaskedLM, EncoderHeads._masked_lm)


class AlbertForSequenceClassification(_AlbertHeads, hf.AlbertForSequenceClassification):
    __doc__ = hf.AlbertForSequenceClassification.__doc__
    forward = labelled(hf.AlbertForSequenceClassification, EncoderHeads._classify_sequences)


class AlbertForMultipleChoice(_AlbertHeads, hf.AlbertForMultipleChoice):
    __doc__ = hf.AlbertForMultipleChoice.__doc__
    forward = labelled(hf.AlbertForMultipleChoice, EncoderHeads._choose)


class AlbertForTokenClassification(_AlbertHeads, hf.AlbertForTokenClassification):
    __doc__ = hf.AlbertForTokenClassification.__doc__
    forward = labelled(hf.AlbertForTokenClassification, EncoderHeads._classify_tokens)


class AlbertForQuestionAnswering(_AlbertHeads, hf.AlbertForQuestionAnswering):
    __doc__ = hf.AlbertForQuestionAnswering.__doc__
    forward = spans(hf.AlbertForQuestionAnswering)
