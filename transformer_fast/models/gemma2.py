"""Gemma 2 (Gemma Team, 2024), every head: norms around each sublayer, softcaps, a window in every other layer."""

from transformers.models.gemma2 import modeling_gemma2 as hf

from ..layers import TransformerSpec
from ._base import activation_name
from ._decoder import LLAMA_SLOTS, CausalLM, DecoderBase, RMSNorm, spec_of
from ._decoder_classes import classes_of

_SLOTS = LLAMA_SLOTS | {
    "attention_after_norm": "post_attention_layernorm",
    "output_norm": "pre_feedforward_layernorm",
    "output_after_norm": "post_feedforward_layernorm",
}


class _Norm(RMSNorm):
    adds_one = True


class _Base(DecoderBase):
    def spec(self) -> TransformerSpec:
        config = self.config
        return spec_of(
            config,
            activation=activation_name(config.hidden_activation),
            scale=config.query_pre_attn_scalar**-0.5,
            softcap=config.attn_logit_softcapping or 0.0,
        )


class _CausalLM(CausalLM):
    def logits_softcap(self) -> float:
        return self.config.final_logit_softcapping or 0.0


globals().update(classes_of(hf, "Gemma2", __name__, _SLOTS, base=_Base, norm=_Norm, causal=_CausalLM))
