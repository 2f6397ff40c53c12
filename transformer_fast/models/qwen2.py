"""Qwen2 (Yang et al., 2024), every head: Llama's layers with biases on queries, keys and values."""

from transformers.models.qwen2 import modeling_qwen2 as hf

from ..layers import SlotTable
from ._base import Adopted
from ._decoder import LLAMA_SLOTS, CausalLM, DecoderBase, Heads, RMSNorm, base_forward, causal_forward, head_forward
from ._layer import AttentionModule, Layer

__all__ = [
    "Qwen2ForCausalLM",
    "Qwen2ForQuestionAnswering",
    "Qwen2ForSequenceClassification",
    "Qwen2ForTokenClassification",
    "Qwen2Model",
]

SLOTS = SlotTable(**LLAMA_SLOTS)
_ADOPTED = Adopted()


@_ADOPTED.register
class Qwen2RMSNorm(RMSNorm, hf.Qwen2RMSNorm):
    is_rms_norm = True

    @property
    def eps(self) -> float:
        return self.variance_epsilon


@_ADOPTED.register
class Qwen2DecoderLayer(Layer, hf.Qwen2DecoderLayer):
    _table = SLOTS


@_ADOPTED.register
class Qwen2Attention(AttentionModule, hf.Qwen2Attention):
    pass


@_ADOPTED.register
class Qwen2Model(DecoderBase, hf.Qwen2Model):
    __doc__ = hf.Qwen2Model.__doc__
    _adopted = _ADOPTED
    _slots = SLOTS
    forward = base_forward(hf.Qwen2Model)


class _Heads(Heads):
    _adopted = _ADOPTED


class Qwen2ForCausalLM(CausalLM, _Heads, hf.Qwen2ForCausalLM):
    __doc__ = hf.Qwen2ForCausalLM.__doc__
    forward = causal_forward(hf.Qwen2ForCausalLM)


class Qwen2ForSequenceClassification(_Heads, hf.Qwen2ForSequenceClassification):
    __doc__ = hf.Qwen2ForSequenceClassification.__doc__
    forward = head_forward(hf.Qwen2ForSequenceClassification, Heads._classify)


class Qwen2ForTokenClassification(_Heads, hf.Qwen2ForTokenClassification):
    __doc__ = hf.Qwen2ForTokenClassification.__doc__
    forward = head_forward(hf.Qwen2ForTokenClassification, Heads._classify_tokens)


class Qwen2ForQuestionAnswering(_Heads, hf.Qwen2ForQuestionAnswering):
    __doc__ = hf.Qwen2ForQuestionAnswering.__doc__
    forward = head_forward(hf.Qwen2ForQuestionAnswering, Heads._find_spans, spans=True)
