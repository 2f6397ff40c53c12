"""Code that BERT shares with the encoders that have its layers: slot names, the cache of a decoder, the forwards."""

from typing import Any

import torch
import torch.nn.functional as F
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPoolingAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
)

from .._transformers import cached
from ..layers import SlotTable
from ..layers.projection import linear
from ._base import Want, check_inputs
from ._encoder import EncoderBase
from ._forward import public_forward
from ._heads import IGNORE, kept_positions, vocabulary_logits
from ._run_stack import Context, Inputs, decoding_cache, run_stack

__all__ = ["SLOTS", "BertBase", "base_forward", "causal_forward", "masked_lm_forward"]

SLOTS = SlotTable(
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    attention_dropout="attention.self.dropout",
    attention_output="attention.output.dense",
    attention_output_dropout="attention.output.dropout",
    attention_norm="attention.output.LayerNorm",
    cross_query="crossattention.self.query",
    cross_key="crossattention.self.key",
    cross_value="crossattention.self.value",
    cross_dropout="crossattention.self.dropout",
    cross_output="crossattention.output.dense",
    cross_output_dropout="crossattention.output.dropout",
    cross_norm="crossattention.output.LayerNorm",
    up="intermediate.dense",
    activation_fn="intermediate.intermediate_act_fn",
    down="output.dense",
    output_dropout="output.dropout",
    output_norm="output.LayerNorm",
)


class BertBase(EncoderBase):
    """For base models whose layers are BERT's."""

    encoder: Any
    gradient_checkpointing: bool

    def _layers(self):
        return self.encoder.layer

    def _pool(self, first: torch.Tensor) -> torch.Tensor | None:
        """Without a pooler, the first positions unchanged: some heads have pooling layers of their own."""
        pooler = getattr(self, "pooler", None)
        return first if pooler is None else pooler.activation(linear(pooler.dense, first))

    def _cache(self, past_key_values, use_cache, encoder_states):
        if not self.config.is_decoder:
            return past_key_values, False
        crosses = encoder_states is not None or self.config.is_encoder_decoder
        return decoding_cache(self, past_key_values, use_cache, crosses=crosses, in_training=True)


def base_forward(hf_class: Any, *, pools: bool = True):
    """forward of a base model. pools: its output class has a pooler_output."""

    @public_forward(hf_class.forward)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        past_key_values=None,
        use_cache: bool | None = None,
        **kwargs,
    ):
        want = kwargs.pop("want", None)  # passed by our heads, which read unpadded rows
        past_key_values, use_cache = self._cache(past_key_values, use_cache, encoder_hidden_states)
        states = encoder_hidden_states if self.config.is_decoder else None
        encoded = run_stack(
            self, Inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds),
            want or Want(read_first=pools and self.pooler is not None, returned=pools), kwargs,
            Context(past_key_values, use_cache, states, encoder_attention_mask),
        )  # fmt: skip
        if want is not None:
            return encoded
        shared = cached(encoded.past_key_values) | encoded.extras(cross=True)
        states = encoded.restored()
        if pools:
            output = BaseModelOutputWithPoolingAndCrossAttentions(
                last_hidden_state=states, pooler_output=encoded.pooled, **shared
            )
        else:
            output = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=states, **shared)
        return self._finish(output, kwargs)

    return forward


def masked_lm_forward(hf_class: Any):
    """forward of a masked language modelling head that passes encoder states to its base."""

    @public_forward(hf_class.forward)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ):
        inputs = Inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        cross = {"encoder_hidden_states": encoder_hidden_states, "encoder_attention_mask": encoder_attention_mask}
        return self._masked_lm(inputs, labels, kwargs | cross)

    return forward


def causal_forward(hf_class: Any):
    """forward of a language modelling head on a decoder."""

    @public_forward(hf_class.forward)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        past_key_values=None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ):
        shifted = kwargs.get("shift_labels")
        if labels is not None:
            use_cache = False
            if shifted is None:  # position i predicts token i + 1
                shifted = F.pad(labels, (0, 1), value=IGNORE)[..., 1:]
        inputs = Inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        cross = {"encoder_hidden_states": encoder_hidden_states, "encoder_attention_mask": encoder_attention_mask}
        stored = {"past_key_values": past_key_values, "use_cache": use_cache}
        source = check_inputs(input_ids, inputs_embeds, self.base_model.embeddings.word_embeddings.embedding_dim)
        read = kept_positions(source, logits_to_keep, shifted, encoder_hidden_states is not None)
        encoded = self._encode(inputs, Want(read=read), kwargs | cross | stored)
        kept = encoded.kept(logits_to_keep)
        logits = vocabulary_logits(self._vocabulary_head().decoder, self._transform(kept.rows), kept.unpadding)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return self._finish(
            CausalLMOutputWithCrossAttentions(
                loss=loss, logits=logits, **cached(encoded.past_key_values), **encoded.extras(cross=True)
            ),
            kwargs,
        )

    return forward
