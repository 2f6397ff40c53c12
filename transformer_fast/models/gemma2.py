"""Gemma 2 (Gemma Team, 2024), every head: norms around each sublayer, softcaps, a window in every other layer."""

from transformers.models.gemma2 import modeling_gemma2 as hf

from ..layers import SlotTable, TransformerSpec
from ._base import Adopted, activation_name
from ._decoder import (
    LLAMA_SLOTS,
    CausalLM,
    DecoderBase,
    Heads,
    RMSNorm,
    base_forward,
    causal_forward,
    head_forward,
    spec_of,
)
from ._layer import AttentionModule, Layer

__all__ = [
    "Gemma2ForCausalLM",
    "Gemma2ForSequenceClassification",
    "Gemma2ForTokenClassification",
    "Gemma2Model",
]

SLOTS = SlotTable(
    **LLAMA_SLOTS | {"output_norm": "pre_feedforward_layernorm"},
    attention_after_norm="post_attention_layernorm",
    output_after_norm="post_feedforward_layernorm",
)
_ADOPTED = Adopted()


@_ADOPTED.register
class Gemma2RMSNorm(RMSNorm, hf.Gemma2RMSNorm):
    is_rms_norm = True
    adds_one = True


@_ADOPTED.register
class Gemma2DecoderLayer(Layer, hf.Gemma2DecoderLayer):
    _table = SLOTS


@_ADOPTED.register
class Gemma2Attention(AttentionModule, hf.Gemma2Attention):
    pass


@_ADOPTED.register
class Gemma2Model(DecoderBase, hf.Gemma2Model):
    __doc__ = hf.Gemma2Model.__doc__
    _adopted = _ADOPTED
    _slots = SLOTS
    forward = base_forward(hf.Gemma2Model)

    def spec(self) -> TransformerSpec:
        config = self.config
        return spec_of(
            config,
            activation=activation_name(config.hidden_activation),
            scale=config.query_pre_attn_scalar**-0.5,
            softcap=config.attn_logit_softcapping or 0.0,
        )


class _Heads(Heads):
    _adopted = _ADOPTED


class Gemma2ForCausalLM(CausalLM, _Heads, hf.Gemma2ForCausalLM):
    __doc__ = hf.Gemma2ForCausalLM.__doc__
    forward = causal_forward(hf.Gemma2ForCausalLM)

    def logits_softcap(self) -> float:
        return self.config.final_logit_softcapping or 0.0


class Gemma2ForSequenceClassification(_Heads, hf.Gemma2ForSequenceClassification):
    __doc__ = hf.Gemma2ForSequenceClassification.__doc__
    forward = head_forward(hf.Gemma2ForSequenceClassification, Heads._classify)


class Gemma2ForTokenClassification(_Heads, hf.Gemma2ForTokenClassification):
    __doc__ = hf.Gemma2ForTokenClassification.__doc__
    forward = head_forward(hf.Gemma2ForTokenClassification, Heads._classify_tokens)
