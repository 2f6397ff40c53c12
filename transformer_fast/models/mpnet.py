"""MPNet (Song et al., 2020), every head: BERT's layers with T5's relative bias; HF's parameters and names."""

from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.mpnet import modeling_mpnet as hf

from .. import ops
from ..layers import SlotTable
from ._base import Adopted
from ._bert import BertBase
from ._encoder import EncoderHeads, VocabularyHead
from ._forward import public_forward
from ._head_forwards import labelled_without_types, spans_without_types
from ._layer import Layer
from ._roberta import TokenPositions, score_first
from ._run_stack import Inputs

__all__ = [
    "MPNetForMaskedLM",
    "MPNetForMultipleChoice",
    "MPNetForQuestionAnswering",
    "MPNetForSequenceClassification",
    "MPNetForTokenClassification",
    "MPNetModel",
]

SLOTS = SlotTable(
    query="attention.attn.q",
    key="attention.attn.k",
    value="attention.attn.v",
    attention_dropout="attention.attn.dropout",
    attention_output="attention.attn.o",
    attention_output_dropout="attention.dropout",
    attention_norm="attention.LayerNorm",
    up="intermediate.dense",
    activation_fn="intermediate.intermediate_act_fn",
    down="output.dense",
    output_dropout="output.dropout",
    output_norm="output.LayerNorm",
)
_ADOPTED = Adopted()
_BUCKETS, _MAX_DISTANCE = 32, 128  # fixed in HF's code, regardless of the configuration


@_ADOPTED.register
class MPNetLayer(Layer, hf.MPNetLayer, GradientCheckpointingLayer):
    _table = SLOTS


class _MPNetHeads(EncoderHeads):
    _adopted = _ADOPTED
    supports_gradient_checkpointing = True
    lm_head: Any

    def _vocabulary_head(self) -> VocabularyHead:
        head = self.lm_head
        return VocabularyHead(head.dense, "gelu", head.layer_norm, head.decoder)


@_ADOPTED.register
class MPNetModel(TokenPositions, BertBase, hf.MPNetModel):
    __doc__ = hf.MPNetModel.__doc__
    _adopted = _ADOPTED
    supports_gradient_checkpointing = True  # HF's MPNet does not support it

    @public_forward(hf.MPNetModel.forward)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs,
    ):
        inputs = Inputs(input_ids, attention_mask, None, position_ids, inputs_embeds)
        output = self._base_forward(inputs, kwargs, pools=True)
        if type(output) is tuple and self.pooler is None:
            return output[0], None, *output[1:]  # as HF: None in the place of the pooler's output
        return output

    def _relative_bias(self) -> ops.RelativeBias:
        table = self.encoder.relative_attention_bias.weight
        if table.shape[0] < _BUCKETS:
            raise ValueError(
                f"config.relative_attention_num_buckets: wanted at least {_BUCKETS}, as MPNet always uses that "
                f"many, got {table.shape[0]}"
            )
        return ops.RelativeBias(table[:_BUCKETS], _MAX_DISTANCE)


class MPNetForMaskedLM(_MPNetHeads, hf.MPNetForMaskedLM):
    __doc__ = hf.MPNetForMaskedLM.__doc__
    forward = labelled_without_types(hf.MPNetForMaskedLM, EncoderHeads._masked_lm)


class MPNetForSequenceClassification(_MPNetHeads, hf.MPNetForSequenceClassification):
    __doc__ = hf.MPNetForSequenceClassification.__doc__
    forward = labelled_without_types(hf.MPNetForSequenceClassification, EncoderHeads._classify_sequences)

    def _score(self, pooled: torch.Tensor) -> torch.Tensor:
        return score_first(self.classifier, pooled)


class MPNetForMultipleChoice(_MPNetHeads, hf.MPNetForMultipleChoice):
    __doc__ = hf.MPNetForMultipleChoice.__doc__
    forward = labelled_without_types(hf.MPNetForMultipleChoice, EncoderHeads._choose)


class MPNetForTokenClassification(_MPNetHeads, hf.MPNetForTokenClassification):
    __doc__ = hf.MPNetForTokenClassification.__doc__
    forward = labelled_without_types(hf.MPNetForTokenClassification, EncoderHeads._classify_tokens)


class MPNetForQuestionAnswering(_MPNetHeads, hf.MPNetForQuestionAnswering):
    __doc__ = hf.MPNetForQuestionAnswering.__doc__
    forward = spans_without_types(hf.MPNetForQuestionAnswering)
