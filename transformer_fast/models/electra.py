"""ELECTRA (Clark et al., 2020), generator and discriminator, every head: HF's parameters and names, our computation."""

from typing import Any

import torch
import torch.nn.functional as F
from transformers.models.electra import modeling_electra as hf

from .. import ops
from ..generation import GenerationMixin
from ..layers.projection import dropout_p, linear
from ._base import Adopted, Encoded, Want, activation_name
from ._bert import SLOTS, BertBase, base_forward, causal_forward
from ._encoder import EncoderHeads, VocabularyHead
from ._head_forwards import labelled, spans
from ._heads import every_position
from ._layer import AttentionModule, Layer
from ._run_stack import Inputs

__all__ = [
    "ElectraForCausalLM",
    "ElectraForMaskedLM",
    "ElectraForMultipleChoice",
    "ElectraForPreTraining",
    "ElectraForQuestionAnswering",
    "ElectraForSequenceClassification",
    "ElectraForTokenClassification",
    "ElectraModel",
]

_ADOPTED = Adopted()


@_ADOPTED.register
class ElectraLayer(Layer, hf.ElectraLayer):
    _table = SLOTS


@_ADOPTED.register
class ElectraSelfAttention(AttentionModule, hf.ElectraSelfAttention):
    pass


@_ADOPTED.register
class ElectraCrossAttention(AttentionModule, hf.ElectraCrossAttention):
    pass


class _ElectraHeads(EncoderHeads):
    _adopted = _ADOPTED
    generator_predictions: Any
    generator_lm_head: Any

    def _vocabulary_head(self) -> VocabularyHead:
        head = self.generator_predictions
        return VocabularyHead(head.dense, "gelu", head.LayerNorm, self.generator_lm_head)


@_ADOPTED.register
class ElectraModel(BertBase, hf.ElectraModel):
    __doc__ = hf.ElectraModel.__doc__
    _adopted = _ADOPTED
    forward = base_forward(hf.ElectraModel, pools=False)

    def _project(self, rows: torch.Tensor) -> torch.Tensor:
        projection = getattr(self, "embeddings_project", None)
        return rows if projection is None else linear(projection, rows)


class ElectraForPreTraining(_ElectraHeads, hf.ElectraForPreTraining):
    __doc__ = hf.ElectraForPreTraining.__doc__

    def _detect(self, inputs: Inputs, labels: torch.Tensor | None, kwargs: dict):
        """Logits (B, S): high for tokens that look replaced."""
        encoded = self._encode(inputs, Want(), kwargs)
        head, name = self.discriminator_predictions, activation_name(self.config.hidden_act)
        rows = linear(head.dense, encoded.rows, name)
        rows = linear(head.dense_prediction, rows if name else head.activation(rows))
        logits, loss = encoded.unpadding.pad(rows).squeeze(-1), None
        if labels is not None:
            scores, targets = logits, labels.to(logits.device)
            if inputs.attention_mask is not None:
                tokens = inputs.attention_mask.to(logits.device).view(-1, logits.shape[1]) == 1
                scores, targets = scores[tokens], targets[tokens]
            loss = F.binary_cross_entropy_with_logits(scores, targets.float())
        return self._finish(
            hf.ElectraForPreTrainingOutput(loss=loss, logits=logits, **encoded.extras()),  # type: ignore[arg-type]
            kwargs,
        )

    forward = labelled(hf.ElectraForPreTraining, _detect)


class ElectraForMaskedLM(_ElectraHeads, hf.ElectraForMaskedLM):
    __doc__ = hf.ElectraForMaskedLM.__doc__
    forward = labelled(hf.ElectraForMaskedLM, EncoderHeads._masked_lm)


class ElectraForCausalLM(GenerationMixin, _ElectraHeads, hf.ElectraForCausalLM):
    __doc__ = hf.ElectraForCausalLM.__doc__
    forward = causal_forward(hf.ElectraForCausalLM)


class ElectraForSequenceClassification(_ElectraHeads, hf.ElectraForSequenceClassification):
    __doc__ = hf.ElectraForSequenceClassification.__doc__
    forward = labelled(hf.ElectraForSequenceClassification, EncoderHeads._classify_sequences)

    def _score(self, pooled: torch.Tensor) -> torch.Tensor:
        head = self.classifier
        p = dropout_p(head.dropout)
        return linear(head.out_proj, ops.dropout(linear(head.dense, ops.dropout(pooled, p), "gelu"), p))


class ElectraForMultipleChoice(_ElectraHeads, hf.ElectraForMultipleChoice):
    __doc__ = hf.ElectraForMultipleChoice.__doc__
    forward = labelled(hf.ElectraForMultipleChoice, EncoderHeads._choose)

    def _pooled_logits(self, inputs: Inputs, kwargs: dict) -> tuple[torch.Tensor, Encoded]:
        """The summary is HF's module. summary_type "first" reads the first positions, others all, padding included."""
        if self.sequence_summary.summary_type == "first":
            encoded = self._encode(inputs, Want(first_only=True), kwargs)
            states: Any = encoded.pooled[:, None]  # type: ignore[index]
        else:
            source = inputs.source()
            read = every_position(source)
            encoded = self._encode(inputs, Want(read=read), kwargs)
            states = encoded.restored()
        return linear(self.classifier, self.sequence_summary(states)), encoded


class ElectraForTokenClassification(_ElectraHeads, hf.ElectraForTokenClassification):
    __doc__ = hf.ElectraForTokenClassification.__doc__
    forward = labelled(hf.ElectraForTokenClassification, EncoderHeads._classify_tokens)


class ElectraForQuestionAnswering(_ElectraHeads, hf.ElectraForQuestionAnswering):
    __doc__ = hf.ElectraForQuestionAnswering.__doc__
    forward = spans(hf.ElectraForQuestionAnswering)
