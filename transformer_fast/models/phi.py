"""Phi-1, 1.5 and 2 (Gunasekar et al., 2023), every head: one norm for both sublayers, which read the same states; a
part of each head is rotated."""

from typing import Any

from transformers.models.phi import modeling_phi as hf

from ..layers import TransformerSpec
from ._decoder import DecoderBase, spec_of
from ._decoder_classes import classes_of

_SLOTS = {
    "attention_norm": "input_layernorm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "query_norm": "self_attn.q_layernorm",
    "key_norm": "self_attn.k_layernorm",
    "attention_dropout": "self_attn.attention_dropout",
    "attention_output": "self_attn.dense",
    "attention_output_dropout": "resid_dropout",
    "output_norm": "input_layernorm",
    "up": "mlp.fc1",
    "activation_fn": "mlp.activation_fn",
    "down": "mlp.fc2",
    "output_dropout": "resid_dropout",
}


class _Base(DecoderBase):
    embed_dropout: Any
    final_layernorm: Any

    def spec(self) -> TransformerSpec:
        return spec_of(self.config, gated=False, parallel=True, windows=())

    def _final_norm(self) -> Any:
        return self.final_layernorm

    def _input_dropout(self) -> Any:
        return self.embed_dropout


globals().update(classes_of(hf, "Phi", __name__, _SLOTS, base=_Base))
