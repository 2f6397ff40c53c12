"""Code that T5 and the families derived from it share: the blocks, which have the same names in all of them, and the
heads.

The relative position bias is computed inside attention from its table. It exists as a matrix only where attention
weights are requested.
"""

from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions, TokenClassifierOutput

from .. import ops
from ..layers import SlotTable, StackCall, TransformerSpec, Unpadding
from ..layers.embeddings import embed
from ..layers.projection import dropout_p, linear, norm, rms_norm_of
from ..layers.stock import is_shard
from ._base import Encoded, ModelMixin, Want, activation_name
from ._heads import is_labelled, token_loss
from ._layer import Layer
from ._run_stack import Inputs
from ._seq2seq import Seq2SeqBase, StackBase
from ._seq2seq_heads import ClassificationHead, LMHead, QuestionHead

__all__ = [
    "T5BlockBase",
    "T5Classification",
    "T5Encoding",
    "T5Generation",
    "T5NormBase",
    "T5Question",
    "T5StackBase",
    "T5Tagging",
    "slot_tables",
]

_SELF = {
    "query": "layer.0.SelfAttention.q",
    "key": "layer.0.SelfAttention.k",
    "value": "layer.0.SelfAttention.v",
    "attention_dropout": "layer.0.SelfAttention.dropout",
    "attention_output": "layer.0.SelfAttention.o",
    "attention_output_dropout": "layer.0.dropout",
    "attention_norm": "layer.0.layer_norm",
}
_CROSS = {
    "cross_query": "layer.1.EncDecAttention.q",
    "cross_key": "layer.1.EncDecAttention.k",
    "cross_value": "layer.1.EncDecAttention.v",
    "cross_dropout": "layer.1.EncDecAttention.dropout",
    "cross_output": "layer.1.EncDecAttention.o",
    "cross_output_dropout": "layer.1.dropout",
    "cross_norm": "layer.1.layer_norm",
}


def _slots(is_decoder: bool, gated: bool, **more: str) -> SlotTable:
    block = f"layer.{2 if is_decoder else 1}"
    inner = f"{block}.DenseReluDense"
    paths = {
        "up": f"{inner}.wi_0" if gated else f"{inner}.wi",
        "activation_fn": f"{inner}.act",
        "activation_dropout": f"{inner}.dropout",
        "down": f"{inner}.wo",
        "output_dropout": f"{block}.dropout",
        "output_norm": f"{block}.layer_norm",
    }
    if gated:
        paths["gate"] = f"{inner}.wi_1"
    return SlotTable(**_SELF, **(_CROSS if is_decoder else {}), **paths, **more)


def slot_tables(**more: str) -> dict[tuple[bool, bool], SlotTable]:
    """{(the block is a decoder's, it is gated): slots}. more: slots that a family has in addition to T5's."""
    return {(d, g): _slots(d, g, **more) for d in (False, True) for g in (False, True)}


SLOTS = slot_tables()


class T5NormBase:
    variance_epsilon: float

    @property
    def eps(self) -> float:
        """HF's variance_epsilon under the name that torch's norms use."""
        return self.variance_epsilon

    @eps.setter
    def eps(self, value: float):
        self.variance_epsilon = value

    def forward(self, hidden_states):
        if ops.exporting() or torch.jit.is_tracing():
            return super().forward(hidden_states)  # type: ignore[misc]
        return rms_norm_of(self, hidden_states)


class T5BlockBase(Layer):
    is_decoder: bool
    layer: Any
    _tables = SLOTS

    def slots(self) -> SlotTable:
        return self._tables[self.is_decoder, hasattr(self.layer[-1].DenseReluDense, "wi_1")]

    def _fused(self, hidden_states, call: StackCall, *args, **kwargs):
        if call.relative_bias is not None and call.relative_bias.table is None:  # the first block, which owns the table
            call.share_table(self.layer[0].SelfAttention.relative_attention_bias.weight)
        return super()._fused(hidden_states, call, *args, **kwargs)


class T5StackBase(StackBase):
    """_tables: the slot tables of its blocks."""

    block: Any
    dropout: Any
    final_layer_norm: Any
    is_decoder: bool
    _tables = SLOTS
    _averaging = ("eager", "sdpa")  # HF's sdpa adds the lowest number to the bias where a key is masked

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        inputs_embeds=None,
        past_key_values=None,
        use_cache=None,
        **kwargs,
    ):
        want = kwargs.pop("want", None)
        if self.is_decoder:
            return self._decode(
                want, input_ids, attention_mask, encoder_hidden_states, encoder_attention_mask, past_key_values,
                inputs_embeds, use_cache, kwargs,
            )  # fmt: skip
        if use_cache:
            raise ValueError("use_cache: an encoder has no cache; wanted False or None, got True")
        return self._encode(want, input_ids, attention_mask, inputs_embeds, kwargs)

    def _decodes(self) -> bool:
        return self.is_decoder

    def _layers(self):
        return self.block

    def _slots(self) -> SlotTable:
        return self._tables[self.is_decoder, self.config.is_gated_act]

    def _spec(self, causal: bool) -> TransformerSpec:
        config = self.config
        return TransformerSpec(
            num_heads=config.num_heads,
            head_dim=config.d_kv,
            scale=1.0,
            causal=causal,
            norm_position="pre",
            activation=activation_name(config.dense_act_fn),
            gated=config.is_gated_act,
            clamp_float16=True,
        )

    def _relative_bias(self) -> ops.RelativeBias | None:
        if not len(self.block):
            return None
        block: Any = self.block[0]
        attention = block.layer[0].SelfAttention
        table: Any = attention.relative_attention_bias.weight
        table = None if is_shard(table) else table  # the first block gathers and shares it, see T5BlockBase._fused
        return ops.RelativeBias(table, attention.relative_attention_max_distance, not self.is_decoder)

    def _embed(self, unpadding: Unpadding, inputs: Inputs, positions: torch.Tensor | None, past) -> torch.Tensor:
        return embed(
            unpadding, self.embed_tokens, None, None, None, self.dropout, input_ids=inputs.input_ids,
            inputs_embeds=inputs.inputs_embeds, position_ids=None, segment_ids=None,
        )  # fmt: skip

    def _step_parts(self) -> dict[str, Any]:
        block: Any = self.block[0]
        attention = block.layer[0].SelfAttention
        return {
            "final_norm": self.final_layer_norm,
            "relative_bias": attention.relative_attention_bias,
            "relative_max_distance": attention.relative_attention_max_distance,
        }

    def _encoder_output(self, encoded: Encoded):
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=encoded.restored(), **encoded.extras(cross=True)
        )

    def _close(self, rows: torch.Tensor) -> torch.Tensor:
        return ops.dropout(norm(self.final_layer_norm, rows), dropout_p(self.dropout))


class T5Generation(Seq2SeqBase, LMHead):
    model_dim: int
    final_logits_bias = None
    _caches_beside_labels = True

    def _head_scale(self) -> float:
        return self.model_dim**-0.5 if self.config.scale_decoder_outputs else 1.0


class T5Encoding(ModelMixin):
    encoder: Any

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs,
    ):
        want = kwargs.pop("want", None)
        options = {k: v for k, v in kwargs.items() if k != "return_dict"}
        encoded = self.encoder(input_ids, attention_mask, inputs_embeds=inputs_embeds, want=want or Want(), **options)
        return encoded if want is not None else self._finish(self.encoder._encoder_output(encoded), kwargs)


class T5Classification(ClassificationHead):
    _starts_with_input = True


class T5Tagging(ModelMixin):
    transformer: Any
    dropout: Any
    classifier: Any

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ):
        options = {k: v for k, v in kwargs.items() if k != "return_dict"}
        encoded = self.transformer(
            input_ids, attention_mask, inputs_embeds, want=Want(read=is_labelled(labels)), **options
        )
        rows = ops.dropout(encoded.rows, dropout_p(self.dropout))
        logits = encoded.unpadding.pad(linear(self.classifier, rows))
        loss = None if labels is None else token_loss(logits, labels)
        return self._finish(TokenClassifierOutput(loss=loss, logits=logits, **encoded.extras()), kwargs)


class T5Question(Seq2SeqBase, QuestionHead):
    _starts_with_input = True
