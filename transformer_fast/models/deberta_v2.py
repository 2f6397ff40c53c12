"""DeBERTa-v2 and v3 (He et al., 2021), every head: HF's parameters and names, our computation."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.deberta_v2 import modeling_deberta_v2 as hf

from .. import ops
from ..layers import (
    Disentangled,
    SlotTable,
    StackCall,
    TransformerSpec,
    Unpadding,
    padding_is_computed,
    positions_kept,
    transformer_layer,
)
from ..layers.embeddings import embed
from ..layers.projection import add_norm, dropout_p, linear, norm
from ._base import Adopted, activation_name
from ._encoder import EncoderBase, EncoderHeads, VocabularyHead
from ._forward import public_forward
from ._head_forwards import labelled, spans
from ._heads import classification_loss
from ._layer import Layer
from ._run_stack import Inputs

__all__ = [
    "DebertaV2ForMaskedLM",
    "DebertaV2ForMultipleChoice",
    "DebertaV2ForQuestionAnswering",
    "DebertaV2ForSequenceClassification",
    "DebertaV2ForTokenClassification",
    "DebertaV2Model",
]

_SLOTS = {
    "query": "attention.self.query_proj",
    "key": "attention.self.key_proj",
    "value": "attention.self.value_proj",
    "attention_dropout": "attention.self.dropout",
    "attention_output": "attention.output.dense",
    "attention_output_dropout": "attention.output.dropout",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "activation_fn": "intermediate.intermediate_act_fn",
    "down": "output.dense",
    "output_dropout": "output.dropout",
    "output_norm": "output.LayerNorm",
    "position_dropout": "attention.self.pos_dropout",
}
SLOTS = SlotTable(**_SLOTS, position_key="attention.self.pos_key_proj", position_query="attention.self.pos_query_proj")
_SHARED = SlotTable(**_SLOTS, position_key="attention.self.key_proj", position_query="attention.self.query_proj")
_ADOPTED = Adopted()


@_ADOPTED.register
class DebertaV2Layer(Layer, hf.DebertaV2Layer):
    attention: Any

    def slots(self) -> SlotTable:
        return _SHARED if self.attention.self.share_att_key else SLOTS

    def _fused(self, hidden_states, call, index, first_only=False, distances=None, past_key_values=None):
        w, kinds = self.slots().read(self), self.attention.self.pos_att_type  # type: ignore[arg-type]
        if "c2p" not in kinds:
            w = w._replace(position_key=None)
        if "p2c" not in kinds:
            w = w._replace(position_query=None)
        return transformer_layer(w, hidden_states, call, index, first_only, None, None, distances)


@_ADOPTED.register
class DebertaV2Model(EncoderBase, hf.DebertaV2Model):
    __doc__ = hf.DebertaV2Model.__doc__
    _adopted = _ADOPTED
    encoder: Any

    @public_forward(hf.DebertaV2Model.forward)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ):
        kwargs |= {
            "output_attentions": output_attentions, "output_hidden_states": output_hidden_states,
            "return_dict": return_dict,
        }  # fmt: skip
        inputs = Inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        return self._base_forward(inputs, kwargs)

    def _spec(self, causal: bool = False) -> TransformerSpec:
        config, width = self.config, self._head_dim()
        terms = 1 + sum(kind in (config.pos_att_type or ()) for kind in ("c2p", "p2c"))
        return TransformerSpec(
            num_heads=config.num_attention_heads,
            head_dim=width,
            scale=(width * terms) ** -0.5,
            activation=activation_name(config.hidden_act),
            disentangled=True,
        )

    def _head_dim(self) -> int:
        config = self.config
        return getattr(config, "attention_head_size", config.hidden_size // config.num_attention_heads)

    def _layers(self):
        encoder = self.encoder
        if encoder.conv is None:
            return encoder.layer
        return [_Convolved(encoder.layer[0], encoder.conv), *encoder.layer[1:]]

    def _plan(self, spec: TransformerSpec, inputs: Inputs, batch: int, length: int, device, **options) -> StackCall:
        ops.parallel.refuse("DeBERTa's attention", "it cannot exchange the keys of distances between processes")
        mask, encoder = inputs.attention_mask, self.encoder
        if mask is not None and mask.dim() != 2:
            raise ValueError(f"attention_mask: wanted shape {(batch, length)}, got {tuple(mask.shape)}")
        if mask is not None:
            mask = mask.to(device) != 0
            options["read"] = _read(mask.expand(batch, length), options["read"], options["read_first"])
        if options["documents"] is not None and encoder.conv is not None:
            raise ValueError(
                "cu_seq_lens_q, seq_idx: wanted None, as the convolution of this model (config.conv_kernel_size) would "
                "mix neighbouring documents"
            )
        call = super()._plan(spec, inputs, batch, length, device, **options)
        weighted = call.attentions is not None
        longest = length if weighted or call.unpadding.index is None else call.unpadding.max_seqlen
        places, first, last = self._places(max(longest, 1), device)
        call.disentangled = Disentangled(call.unpadding, places, first, last, weighted)
        if encoder.relative_attention:
            call.distances = encoder.get_rel_embedding()
            if "layer_norm" in encoder.norm_rel_ebd:
                call.distances = norm(encoder.LayerNorm, encoder.rel_embeddings.weight)
        return call

    def _places(self, length: int, device) -> tuple[torch.Tensor, int, int | None]:
        """(per distance, its row in the embedding table; the lowest of these rows; the highest, None if unknown)."""
        encoder = self.encoder
        places = torch.arange(1 - length, length)
        if not encoder.relative_attention:
            return places.to(device), 0, None
        buckets, farthest = encoder.position_buckets, encoder.max_relative_positions
        if buckets > 0 and farthest > 0:
            places = hf.make_log_bucket_position(places, buckets, farthest).long()
        span = buckets if buckets > 0 else farthest
        places = (places + span).clamp(0, 2 * span - 1)
        if torch.compiler.is_compiling() or not ops.concrete(places):
            return places.to(device), 0, None
        return places.to(device), int(places[0]), int(places[-1])

    def _embed(self, unpadding: Unpadding, inputs: Inputs, positions: torch.Tensor | None, past) -> torch.Tensor:
        e = self.embeddings
        rows = embed(
            unpadding, e.word_embeddings, e.position_embeddings, e.token_type_embeddings, None, None,
            input_ids=inputs.input_ids, inputs_embeds=inputs.inputs_embeds, position_ids=positions,
            segment_ids=inputs.token_type_ids,
        )  # fmt: skip
        rows = norm(e.LayerNorm, rows if e.embed_proj is None else linear(e.embed_proj, rows))
        return ops.dropout(_without_padding(rows, unpadding), dropout_p(e.dropout))


class _Convolved:
    """The first layer, plus the convolution of that layer's input."""

    def __init__(self, layer: nn.Module, conv: Any):
        self.layer, self.conv = layer, conv

    def __call__(self, rows, call: StackCall, index: int, first_only: bool, *states, past_key_values=None):
        unpadding, conv = call.unpadding, self.conv
        out = self.layer(rows, call, index, False, *states, past_key_values=past_key_values)
        near = conv.conv(unpadding.pad(rows).transpose(1, 2)).transpose(1, 2)
        near = unpadding.unpad(near)
        near = ACT2FN[conv.conv_act](ops.dropout(near, dropout_p(conv.dropout)))
        out = _without_padding(add_norm(conv.LayerNorm, near, out, 0.0), unpadding)
        return unpadding.first(out) if first_only else out


def _without_padding(rows: torch.Tensor, unpadding: Unpadding) -> torch.Tensor:
    """rows with zeros at computed padding, as HF sets them before the first layer and after the convolution."""
    if unpadding.mask is None or unpadding.key_mask is None:
        return rows
    return rows * unpadding.unpad(unpadding.mask[..., None]).to(rows.dtype)


def _read(mask: torch.Tensor, read: torch.Tensor | None, read_first: bool) -> torch.Tensor | None:
    """(B, S) bool: the positions to compute in addition to the tokens. If padding is read, all padding is computed:
    a query at padding averages the values of all positions."""
    if torch.compiler.is_compiling() or not ops.concrete(mask) or padding_is_computed():
        return torch.ones_like(mask)
    beside = positions_kept(mask, None if read is None else read.to(mask.device), read_first) & ~mask
    return torch.ones_like(mask) if bool(beside.any()) else read


class _Decoder(nn.Module):
    """Scores of all words, by the embedding table (config.legacy=False)."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor):
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return ops.linear(rows, self.weight, self.bias)


class _DebertaV2Heads(EncoderHeads):
    _adopted = _ADOPTED
    cls: Any
    deberta: Any
    legacy: bool
    lm_predictions: Any
    num_labels: int
    pooler: Any

    def _vocabulary_head(self) -> VocabularyHead:
        if self.legacy:
            head = self.cls.predictions
            return VocabularyHead(
                head.transform.dense, head.transform.transform_act_fn, head.transform.LayerNorm, head.decoder
            )
        head = self.lm_predictions.lm_head
        decoder = _Decoder(self.deberta.embeddings.word_embeddings.weight, head.bias)
        return VocabularyHead(head.dense, head.transform_act_fn, head.LayerNorm, decoder)

    def _before_classifier(self, pooled: torch.Tensor) -> torch.Tensor:
        pooler = self.pooler
        rows = linear(pooler.dense, ops.dropout(pooled, dropout_p(pooler.dropout)))
        return ACT2FN[pooler.config.pooler_hidden_act](rows)

    def _classify_sequences(self, inputs: Inputs, labels: torch.Tensor | None, kwargs: dict):
        logits, encoded = self._pooled_logits(inputs, kwargs)
        loss = None
        if labels is not None:
            loss, logits = self._classification_loss(logits, labels)
        return self._finish(SequenceClassifierOutput(loss=loss, logits=logits, **encoded.extras()), kwargs)

    def _classification_loss(self, logits: torch.Tensor, labels: torch.Tensor):
        """HF's rule for this family: without config.problem_type, labels below 0 are ignored."""
        if self.config.problem_type is not None:
            return classification_loss(self.config, logits, labels), logits
        labels = labels.to(logits.device)
        if self.num_labels == 1:
            logits = logits.view(-1).to(labels.dtype)
            return F.mse_loss(logits, labels.view(-1)), logits
        if labels.dim() == 1 or labels.shape[-1] == 1:
            counted = (labels >= 0).nonzero()
            if not len(counted):
                return torch.tensor(0).to(logits), logits
            scores = logits.gather(0, counted.expand(len(counted), logits.shape[1]))
            chosen = labels.long().gather(0, counted.view(-1))
            return F.cross_entropy(scores.view(-1, self.num_labels).float(), chosen.view(-1)), logits
        return -(logits.log_softmax(-1) * labels).sum(-1).mean(), logits


class DebertaV2ForMaskedLM(_DebertaV2Heads, hf.DebertaV2ForMaskedLM):
    __doc__ = hf.DebertaV2ForMaskedLM.__doc__
    forward = labelled(hf.DebertaV2ForMaskedLM, EncoderHeads._masked_lm)


class DebertaV2ForSequenceClassification(_DebertaV2Heads, hf.DebertaV2ForSequenceClassification):
    __doc__ = hf.DebertaV2ForSequenceClassification.__doc__
    forward = labelled(hf.DebertaV2ForSequenceClassification, _DebertaV2Heads._classify_sequences)


class DebertaV2ForTokenClassification(_DebertaV2Heads, hf.DebertaV2ForTokenClassification):
    __doc__ = hf.DebertaV2ForTokenClassification.__doc__
    forward = labelled(hf.DebertaV2ForTokenClassification, EncoderHeads._classify_tokens)


class DebertaV2ForMultipleChoice(_DebertaV2Heads, hf.DebertaV2ForMultipleChoice):
    __doc__ = hf.DebertaV2ForMultipleChoice.__doc__
    forward = labelled(hf.DebertaV2ForMultipleChoice, EncoderHeads._choose)


class DebertaV2ForQuestionAnswering(_DebertaV2Heads, hf.DebertaV2ForQuestionAnswering):
    __doc__ = hf.DebertaV2ForQuestionAnswering.__doc__
    forward = spans(hf.DebertaV2ForQuestionAnswering)
