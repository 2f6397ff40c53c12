"""Mistral (Jiang et al., 2023), every head: Llama's layers with a window over the last keys."""

from transformers.models.mistral import modeling_mistral as hf

from ..layers import SlotTable
from ._base import Adopted
from ._decoder import LLAMA_SLOTS, CausalLM, DecoderBase, Heads, RMSNorm, base_forward, causal_forward, head_forward
from ._layer import AttentionModule, Layer

__all__ = [
    "MistralForCausalLM",
    "MistralForQuestionAnswering",
    "MistralForSequenceClassification",
    "MistralForTokenClassification",
    "MistralModel",
]

SLOTS = SlotTable(**LLAMA_SLOTS)
_ADOPTED = Adopted()


@_ADOPTED.register
class MistralRMSNorm(RMSNorm, hf.MistralRMSNorm):
    is_rms_norm = True

    @property
    def eps(self) -> float:
        return self.variance_epsilon


@_ADOPTED.register
class MistralDecoderLayer(Layer, hf.MistralDecoderLayer):
    _table = SLOTS


@_ADOPTED.register
class MistralAttention(AttentionModule, hf.MistralAttention):
    pass


@_ADOPTED.register
class MistralModel(DecoderBase, hf.MistralModel):
    __doc__ = hf.MistralModel.__doc__
    _adopted = _ADOPTED
    _slots = SLOTS
    forward = base_forward(hf.MistralModel)


class _Heads(Heads):
    _adopted = _ADOPTED


class MistralForCausalLM(CausalLM, _Heads, hf.MistralForCausalLM):
    __doc__ = hf.MistralForCausalLM.__doc__
    forward = causal_forward(hf.MistralForCausalLM)


class MistralForSequenceClassification(_Heads, hf.MistralForSequenceClassification):
    __doc__ = hf.MistralForSequenceClassification.__doc__
    forward = head_forward(hf.MistralForSequenceClassification, Heads._classify)


class MistralForTokenClassification(_Heads, hf.MistralForTokenClassification):
    __doc__ = hf.MistralForTokenClassification.__doc__
    forward = head_forward(hf.MistralForTokenClassification, Heads._classify_tokens)


class MistralForQuestionAnswering(_Heads, hf.MistralForQuestionAnswering):
    __doc__ = hf.MistralForQuestionAnswering.__doc__
    forward = head_forward(hf.MistralForQuestionAnswering, Heads._find_spans, spans=True)
