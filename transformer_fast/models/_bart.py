"""Code that BART and the families derived from it share: the layers, which have the same names in all of them, the two
kinds of embedding, and the forward methods of the stacks."""

from typing import Any

import torch

from ..layers import SlotTable, TransformerSpec, Unpadding
from ..layers.embeddings import embed
from ..layers.projection import norm
from ._base import activation_name
from ._layer import Layer
from ._run_stack import Inputs
from ._seq2seq import StackBase

__all__ = [
    "BartDecoderBase",
    "BartEncoderBase",
    "BartLayer",
    "LearnedPositions",
    "SLOTS",
    "ScalesGivenEmbeddings",
    "SinusoidalPositions",
]

SLOTS = SlotTable(
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    attention_dropout="self_attn.dropout",
    attention_output="self_attn.out_proj",
    attention_output_dropout="dropout",
    attention_norm="self_attn_layer_norm",
    cross_query="encoder_attn.q_proj",
    cross_key="encoder_attn.k_proj",
    cross_value="encoder_attn.v_proj",
    cross_dropout="encoder_attn.dropout",
    cross_output="encoder_attn.out_proj",
    cross_output_dropout="dropout",
    cross_norm="encoder_attn_layer_norm",
    up="fc1",
    activation_fn="activation_fn",
    activation_dropout="activation_dropout",
    down="fc2",
    output_dropout="dropout",
    output_norm="final_layer_norm",
)


class BartLayer(Layer):
    _table = SLOTS


class _BartStack(StackBase):
    """_pre_norm: norms come before the sublayers, and one more, `layer_norm`, after the last layer."""

    layers: Any
    embed_positions: Any
    layer_norm: Any
    _pre_norm = False

    def _layers(self):
        return self.layers

    def _slots(self) -> SlotTable:
        return SLOTS

    def _bart_spec(self, heads: int, causal: bool, clamp_float16: bool) -> TransformerSpec:
        return TransformerSpec(
            num_heads=heads,
            head_dim=self.config.d_model // heads,
            causal=causal,
            norm_position="pre" if self._pre_norm else "post",
            activation=activation_name(self.config.activation_function),
            clamp_float16=clamp_float16,
        )

    def _close(self, rows: torch.Tensor) -> torch.Tensor:
        return norm(self.layer_norm, rows) if self._pre_norm else rows

    def _step_parts(self) -> dict[str, Any]:
        return {"position": self.embed_positions, "final_norm": self.layer_norm if self._pre_norm else None}


class LearnedPositions:
    """Mixin, placed before a stack: embeddings are norm(word + learned position), as in BART."""

    embed_tokens: Any
    embed_positions: Any
    layernorm_embedding: Any
    dropout: float
    training: bool

    def _embed(self, unpadding: Unpadding, inputs: Inputs, positions: torch.Tensor | None, past) -> torch.Tensor:
        return embed(
            unpadding, self.embed_tokens, self._embed_positions, None, self.layernorm_embedding,
            self.dropout if self.training else 0.0, input_ids=inputs.input_ids,
            inputs_embeds=inputs.inputs_embeds, position_ids=None, segment_ids=None, past=past,
        )  # fmt: skip

    def _step_parts(self) -> dict[str, Any]:
        return super()._step_parts() | {  # type: ignore[misc]
            "position_offset": self.embed_positions.offset,
            "embed_scale": getattr(self.embed_tokens, "embed_scale", 1.0),
            "embedding_norm": self.layernorm_embedding,
        }

    def _embed_positions(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embed_positions(None, position_ids=ids)[0]

    def _most_positions(self) -> int:
        return self.embed_positions.num_embeddings - self.embed_positions.offset


class SinusoidalPositions:
    """Mixin, placed before a stack: embeddings are scale * word + sinusoidal position, as in Marian."""

    embed_tokens: Any
    embed_positions: Any
    embed_scale: float
    dropout: float
    training: bool

    def _embed(self, unpadding: Unpadding, inputs: Inputs, positions: torch.Tensor | None, past) -> torch.Tensor:
        return embed(
            unpadding, self._embed_words, self._embed_positions, None, None, self.dropout if self.training else 0.0,
            input_ids=inputs.input_ids, inputs_embeds=inputs.inputs_embeds, position_ids=None, segment_ids=None,
            past=past,
        )  # fmt: skip

    def _step_parts(self) -> dict[str, Any]:
        return super()._step_parts() | {"embed_scale": self.embed_scale}  # type: ignore[misc]

    def _embed_words(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(ids) * self.embed_scale

    def _embed_positions(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embed_positions(None, position_ids=ids)

    def _most_positions(self) -> int:
        return self.embed_positions.num_embeddings


class ScalesGivenEmbeddings(SinusoidalPositions):
    """For decoders that scale inputs_embeds too; the encoders of these families do not."""

    def _embed(self, unpadding: Unpadding, inputs: Inputs, positions: torch.Tensor | None, past) -> torch.Tensor:
        if inputs.inputs_embeds is not None:
            inputs = inputs._replace(inputs_embeds=inputs.inputs_embeds * self.embed_scale)
        return super()._embed(unpadding, inputs, positions, past)


class BartEncoderBase(_BartStack):
    def _decodes(self) -> bool:
        return False

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs,
    ):
        """As HF's. Padding is dropped before the first layer; outputs at padding are zeros."""
        want = kwargs.pop("want", None)
        return self._encode(want, input_ids, attention_mask, inputs_embeds, kwargs)

    def _spec(self, causal: bool) -> TransformerSpec:
        return self._bart_spec(self.config.encoder_attention_heads, causal, True)


class BartDecoderBase(_BartStack):
    def _decodes(self) -> bool:
        return True

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ):
        """As HF's. Without a cache, padding is dropped before the first layer; outputs at padding are zeros."""
        want = kwargs.pop("want", None)
        return self._decode(
            want, input_ids, attention_mask, encoder_hidden_states, encoder_attention_mask, past_key_values,
            inputs_embeds, use_cache, kwargs,
        )  # fmt: skip

    def _spec(self, causal: bool) -> TransformerSpec:
        return self._bart_spec(self.config.decoder_attention_heads, causal, False)
