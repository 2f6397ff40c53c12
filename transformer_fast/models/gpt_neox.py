"""GPT-NeoX and Pythia (Black et al., 2022; Biderman et al., 2023), every head: both sublayers read the same states, a
part of each head is rotated, and one weight (heads, 3, head dim) makes queries, keys and values."""

from typing import Any

from transformers.models.gpt_neox import modeling_gpt_neox as hf

from ..layers import TransformerSpec
from ._decoder import DecoderBase, Heads, spec_of
from ._decoder_classes import classes_of

_SLOTS = {
    "attention_norm": "input_layernorm",
    "qkv": "attention.query_key_value",
    "attention_dropout": "attention.attention_dropout",
    "attention_output": "attention.dense",
    "attention_output_dropout": "post_attention_dropout",
    "output_norm": "post_attention_layernorm",
    "up": "mlp.dense_h_to_4h",
    "activation_fn": "mlp.act",
    "down": "mlp.dense_4h_to_h",
    "output_dropout": "post_mlp_dropout",
}


class _Base(DecoderBase):
    emb_dropout: Any
    final_layer_norm: Any

    def spec(self) -> TransformerSpec:
        config = self.config
        return spec_of(
            config, head_dim=config.hidden_size // config.num_attention_heads, key_heads=None, gated=False,
            parallel=config.use_parallel_residual, qkv_by_head=True, windows=(),
        )  # fmt: skip

    def _layers(self):
        return self.layers

    def _final_norm(self) -> Any:
        return self.final_layer_norm

    def _input_dropout(self) -> Any:
        return self.emb_dropout


class _Heads(Heads):
    classifier: Any

    def _token_head(self) -> Any:
        return self.classifier


globals().update(classes_of(hf, "GPTNeoX", __name__, _SLOTS, base=_Base, layer="Layer", heads=_Heads))
