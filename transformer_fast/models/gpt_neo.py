"""GPT-Neo (Black et al., 2021), every head: learned positions, a window in every other layer, unscaled scores."""

from typing import Any

from transformers.models.gpt_neo import modeling_gpt_neo as hf

from ..layers import BeyondFastPath, StackCall, TransformerSpec
from ._base import activation_name
from ._decoder import DecoderBase, Heads, LearnedPositions
from ._decoder_classes import classes_of
from ._gpt import GPTBase
from ._run_stack import Inputs

_SLOTS = {
    "attention_norm": "ln_1",
    "query": "attn.attention.q_proj",
    "key": "attn.attention.k_proj",
    "value": "attn.attention.v_proj",
    "attention_dropout": "attn.attention.attn_dropout",
    "attention_output": "attn.attention.out_proj",
    "attention_output_dropout": "attn.attention.resid_dropout",
    "output_norm": "ln_2",
    "up": "mlp.c_fc",
    "activation_fn": "mlp.act",
    "down": "mlp.c_proj",
    "output_dropout": "mlp.dropout",
}


class _Base(LearnedPositions, GPTBase, DecoderBase):
    ln_f: Any
    wpe: Any
    _positions_setting = "config.max_position_embeddings"

    def spec(self) -> TransformerSpec:
        config = self.config
        windows = tuple(config.window_size if kind == "local" else None for kind in config.attention_layers)
        return TransformerSpec(
            config.num_heads, config.hidden_size // config.num_heads, scale=1.0, causal=True, norm_position="pre",
            activation=activation_name(config.activation_function), windows=windows if any(windows) else (),
        )  # fmt: skip

    def _plan(self, spec: TransformerSpec, inputs: Inputs, batch: int, length: int, device, **options) -> StackCall:
        if inputs.attention_mask is not None and inputs.attention_mask.dim() > 2:
            raise BeyondFastPath("HF's GPT-Neo adds causality and windows to masks of four dimensions")
        return super()._plan(spec, inputs, batch, length, device, **options)

    def _final_norm(self) -> Any:
        return self.ln_f

    def _position_table(self) -> Any:
        return self.wpe


class _Heads(Heads):
    classifier: Any

    def _token_head(self) -> Any:
        return self.classifier


globals().update(classes_of(hf, "GPTNeo", __name__, _SLOTS, base=_Base, layer="Block", attention=None, heads=_Heads))
