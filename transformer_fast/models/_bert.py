"""What BERT shares with the encoders that have its layers: where they are, the cache of a decoder, the forwards."""

from typing import Any

import torch
import torch.nn.functional as F
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPoolingAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
)
from transformers.utils import logging

from .._transformers import cached
from ..layers import Packing, SlotTable
from ..layers.projection import linear
from ._base import Want, check_inputs
from ._encoder import EncoderBase, Inputs
from ._forward import public_forward
from ._heads import IGNORE, kept_positions, vocabulary_logits

__all__ = ["SLOTS", "BertBase", "base_forward", "causal_forward", "masked_lm_forward"]

logger = logging.get_logger(__name__)

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

    _slots = SLOTS
    encoder: Any
    gradient_checkpointing: bool

    def _layers(self):
        return self.encoder.layer

    def _pool(self, first: torch.Tensor) -> torch.Tensor | None:
        """Without a pooler the first positions as they are, for heads that have layers of their own for them."""
        pooler = getattr(self, "pooler", None)
        return first if pooler is None else pooler.activation(linear(pooler.dense, first))

    def _cache(self, past_key_values, use_cache, encoder_states):
        """HF's rule for when a decoder makes and returns a cache."""
        config = self.config
        if not config.is_decoder:
            return past_key_values, False
        use_cache = config.use_cache if use_cache is None else use_cache
        if use_cache and self.gradient_checkpointing and self.training:
            logger.warning_once("use_cache=True does not go with gradient checkpointing: use_cache=False is used.")
            return None, False
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=config)
            if encoder_states is not None or config.is_encoder_decoder:
                past_key_values = EncoderDecoderCache(past_key_values, DynamicCache(config=config))
        return past_key_values, use_cache


def base_forward(hf_class: Any, *, pools: bool = True):
    """forward of a base model. pools: its outputs name what the pooler gives."""

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
        want = kwargs.pop("want", None)  # given by our heads, which read packed rows
        past_key_values, use_cache = self._cache(past_key_values, use_cache, encoder_hidden_states)
        encoded = self._run(
            want or Want(read_first=pools and self.pooler is not None),
            Inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds), kwargs, past_key_values,
            encoder_hidden_states if self.config.is_decoder else None, encoder_attention_mask,
        )  # fmt: skip
        if not use_cache:
            encoded = encoded._replace(past_key_values=None)
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
    """forward of a masked language modelling head that hands encoder states on to its base."""

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
            if shifted is None:  # position i is scored on the token after it
                shifted = F.pad(labels, (0, 1), value=IGNORE)[..., 1:]
        inputs = Inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        cross = {"encoder_hidden_states": encoder_hidden_states, "encoder_attention_mask": encoder_attention_mask}
        stored = {"past_key_values": past_key_values, "use_cache": use_cache}
        source = check_inputs(input_ids, inputs_embeds, self.base_model.embeddings.word_embeddings.embedding_dim)
        read = kept_positions(source, logits_to_keep, shifted)
        encoded = self._encode(inputs, Want(read=read), kwargs | cross | stored)
        rows, packing = encoded.rows, encoded.packing
        if not isinstance(logits_to_keep, int) or logits_to_keep:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            rows = packing.unpack(rows)[:, kept]
            packing = Packing(*rows.shape[:2])
        logits = vocabulary_logits(self._vocabulary_head().decoder, self._transform(rows), packing)
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
