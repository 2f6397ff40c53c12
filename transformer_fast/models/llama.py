"""Llama (Touvron et al., 2023), every head: HF's parameters and names, our computation."""

from transformers.models.llama import modeling_llama as hf

from ..layers import SlotTable
from ._base import Adopted
from ._decoder import LLAMA_SLOTS, CausalLM, DecoderBase, Heads, RMSNorm, base_forward, causal_forward, head_forward
from ._layer import AttentionModule, Layer

__all__ = [
    "LlamaForCausalLM",
    "LlamaForQuestionAnswering",
    "LlamaForSequenceClassification",
    "LlamaForTokenClassification",
    "LlamaModel",
]

SLOTS = SlotTable(**LLAMA_SLOTS)
_ADOPTED = Adopted()


@_ADOPTED.register
class LlamaRMSNorm(RMSNorm, hf.LlamaRMSNorm):
    is_rms_norm = True

    @property
    def eps(self) -> float:
        return self.variance_epsilon


@_ADOPTED.register
class LlamaDecoderLayer(Layer, hf.LlamaDecoderLayer):
    _table = SLOTS


@_ADOPTED.register
class LlamaAttention(AttentionModule, hf.LlamaAttention):
    pass


@_ADOPTED.register
class LlamaModel(DecoderBase, hf.LlamaModel):
    __doc__ = hf.LlamaModel.__doc__
    _adopted = _ADOPTED
    _slots = SLOTS
    forward = base_forward(hf.LlamaModel)


class _Heads(Heads):
    _adopted = _ADOPTED


class LlamaForCausalLM(CausalLM, _Heads, hf.LlamaForCausalLM):
    __doc__ = hf.LlamaForCausalLM.__doc__
    forward = causal_forward(hf.LlamaForCausalLM)


class LlamaForSequenceClassification(_Heads, hf.LlamaForSequenceClassification):
    __doc__ = hf.LlamaForSequenceClassification.__doc__
    forward = head_forward(hf.LlamaForSequenceClassification, Heads._classify)


class LlamaForTokenClassification(_Heads, hf.LlamaForTokenClassification):
    __doc__ = hf.LlamaForTokenClassification.__doc__
    forward = head_forward(hf.LlamaForTokenClassification, Heads._classify_tokens)


class LlamaForQuestionAnswering(_Heads, hf.LlamaForQuestionAnswering):
    __doc__ = hf.LlamaForQuestionAnswering.__doc__
    forward = head_forward(hf.LlamaForQuestionAnswering, Heads._find_spans, spans=True)
