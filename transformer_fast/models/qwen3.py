"""Qwen3 (Yang et al., 2025), every head: Llama's layers with a norm of each head's queries and keys."""

from transformers.models.qwen3 import modeling_qwen3 as hf

from ..layers import SlotTable
from ._base import Adopted
from ._decoder import LLAMA_SLOTS, CausalLM, DecoderBase, Heads, RMSNorm, base_forward, causal_forward, head_forward
from ._layer import AttentionModule, Layer

__all__ = [
    "Qwen3ForCausalLM",
    "Qwen3ForQuestionAnswering",
    "Qwen3ForSequenceClassification",
    "Qwen3ForTokenClassification",
    "Qwen3Model",
]

SLOTS = SlotTable(
    **LLAMA_SLOTS,
    query_norm="self_attn.q_norm",
    key_norm="self_attn.k_norm",
)
_ADOPTED = Adopted()


@_ADOPTED.register
class Qwen3RMSNorm(RMSNorm, hf.Qwen3RMSNorm):
    is_rms_norm = True

    @property
    def eps(self) -> float:
        return self.variance_epsilon


@_ADOPTED.register
class Qwen3DecoderLayer(Layer, hf.Qwen3DecoderLayer):
    _table = SLOTS


@_ADOPTED.register
class Qwen3Attention(AttentionModule, hf.Qwen3Attention):
    pass


@_ADOPTED.register
class Qwen3Model(DecoderBase, hf.Qwen3Model):
    __doc__ = hf.Qwen3Model.__doc__
    _adopted = _ADOPTED
    _slots = SLOTS
    forward = base_forward(hf.Qwen3Model)


class _Heads(Heads):
    _adopted = _ADOPTED


class Qwen3ForCausalLM(CausalLM, _Heads, hf.Qwen3ForCausalLM):
    __doc__ = hf.Qwen3ForCausalLM.__doc__
    forward = causal_forward(hf.Qwen3ForCausalLM)


class Qwen3ForSequenceClassification(_Heads, hf.Qwen3ForSequenceClassification):
    __doc__ = hf.Qwen3ForSequenceClassification.__doc__
    forward = head_forward(hf.Qwen3ForSequenceClassification, Heads._classify)


class Qwen3ForTokenClassification(_Heads, hf.Qwen3ForTokenClassification):
    __doc__ = hf.Qwen3ForTokenClassification.__doc__
    forward = head_forward(hf.Qwen3ForTokenClassification, Heads._classify_tokens)


class Qwen3ForQuestionAnswering(_Heads, hf.Qwen3ForQuestionAnswering):
    __doc__ = hf.Qwen3ForQuestionAnswering.__doc__
    forward = head_forward(hf.Qwen3ForQuestionAnswering, Heads._find_spans, spans=True)
