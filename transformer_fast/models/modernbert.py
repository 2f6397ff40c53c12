"""ModernBERT (Warner et al., 2024), every head: HF's parameters and names, our computation."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from transformers.modeling_outputs import MaskedLMOutput
from transformers.models.modernbert import modeling_modernbert as hf

from .. import ops
from ..layers import Rotary, SlotTable, TransformerSpec, Unpadding
from ..layers.embeddings import embed
from ..layers.projection import dropout_p, linear, norm
from ._base import Adopted, Encoded, Want, activation_name
from ._encoder import EncoderBase, EncoderHeads, VocabularyHead
from ._forward import public_forward
from ._heads import is_labelled, masked_lm, per_position
from ._layer import AttentionModule, Layer
from ._run_stack import Inputs

__all__ = [
    "ModernBertForMaskedLM",
    "ModernBertForMultipleChoice",
    "ModernBertForQuestionAnswering",
    "ModernBertForSequenceClassification",
    "ModernBertForTokenClassification",
    "ModernBertModel",
]

SLOTS = SlotTable(
    attention_norm="attn_norm",
    qkv="attn.Wqkv",
    attention_dropout="attn.attention_dropout",
    attention_output="attn.Wo",
    attention_output_dropout="attn.out_drop",
    output_norm="mlp_norm",
    up="mlp.Wi",
    activation_fn="mlp.act",
    activation_dropout="mlp.drop",
    down="mlp.Wo",
)
_ADOPTED = Adopted()


@_ADOPTED.register
class ModernBertEncoderLayer(Layer, hf.ModernBertEncoderLayer):
    _table = SLOTS


@_ADOPTED.register
class ModernBertAttention(AttentionModule, hf.ModernBertAttention):
    pass


@_ADOPTED.register
class ModernBertModel(EncoderBase, hf.ModernBertModel):
    __doc__ = hf.ModernBertModel.__doc__
    _adopted = _ADOPTED
    rotary_emb: Any

    @public_forward(hf.ModernBertModel.forward)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs,
    ):
        if isinstance(attention_mask, dict):  # one mask per kind of layer
            return hf.ModernBertModel.forward(self, input_ids, attention_mask, position_ids, inputs_embeds, **kwargs)
        inputs = Inputs(input_ids, attention_mask, None, position_ids, inputs_embeds)
        return self._base_forward(inputs, kwargs)

    def _spec(self, causal: bool = False) -> TransformerSpec:
        config = self.config
        local = config.sliding_window + 1  # the query's own position and sliding_window keys on either side
        windows = tuple(local if kind == "sliding_attention" else None for kind in self._kinds())
        return TransformerSpec(
            num_heads=config.num_attention_heads,
            head_dim=config.hidden_size // config.num_attention_heads,
            norm_position="pre",
            activation=activation_name(config.hidden_activation),
            gated=True,
            windows=windows if any(windows) else (),
        )

    def _layers(self):
        return self.layers

    def _kinds(self) -> list[str]:
        return [layer.attention_type for layer in self.layers]

    def _rotary(self, unpadding: Unpadding, positions: torch.Tensor | None, past, device: torch.device) -> list[Rotary]:
        """The rotary angles of each layer, by HF's rule for the layer's kind, in float32."""
        if positions is None:
            positions = unpadding.columns(device)[None]
        like = torch.empty(0, dtype=torch.float32, device=device)
        found = {}
        for kind in dict.fromkeys(self._kinds()):
            cos, sin = self.rotary_emb(like, positions, kind)
            half = cos.shape[-1] // 2
            found[kind] = Rotary.of(unpadding, cos[..., :half], sin[..., :half])
        return [found[kind] for kind in self._kinds()]

    def _embed(self, unpadding: Unpadding, inputs: Inputs, positions: torch.Tensor | None, past) -> torch.Tensor:
        e = self.embeddings
        return embed(
            unpadding, e.tok_embeddings, None, None, e.norm, e.drop, input_ids=inputs.input_ids,
            inputs_embeds=inputs.inputs_embeds, position_ids=None, segment_ids=None,
        )  # fmt: skip

    def _close(self, rows: torch.Tensor) -> torch.Tensor:
        return norm(self.final_norm, rows)


class _ModernBertHeads(EncoderHeads):
    _adopted = _ADOPTED
    config: Any
    head: Any
    drop: Any
    decoder: Any
    loss_function: Any
    sparse_prediction: bool
    sparse_pred_ignore_index: int

    def _vocabulary_head(self) -> VocabularyHead:
        return VocabularyHead(self.head.dense, self.head.act, self.head.norm, self.decoder)

    def _transform(self, rows: torch.Tensor) -> torch.Tensor:
        name = activation_name(self.config.classifier_activation)
        rows = linear(self.head.dense, rows, name)
        return norm(self.head.norm, rows if name else self.head.act(rows))

    def _logits(self, rows: torch.Tensor) -> torch.Tensor:
        return linear(self.classifier, ops.dropout(self._transform(rows), dropout_p(self.drop)))

    def _span_loss(self, start, end, start_positions, end_positions, kwargs: dict):
        return self.loss_function(start, end, start_positions, end_positions, **kwargs)

    def _masked_lm(self, inputs: Inputs, labels: torch.Tensor | None, kwargs: dict):
        labels = per_position(labels, inputs.source())
        score = partial(self.loss_function, vocab_size=self.config.vocab_size, **kwargs)
        if labels is not None and self.sparse_prediction:
            read = labels != self.sparse_pred_ignore_index
            encoded = self._encode(inputs, Want(read=read), kwargs)
            logits = linear(self.decoder, self._transform(encoded.restored()[read]))
            loss = score(logits, labels[read])
        else:
            encoded = self._encode(inputs, Want(read=is_labelled(labels)), kwargs)
            loss, logits = masked_lm(self.decoder, self._transform(encoded.rows), encoded.unpadding, labels, score)
        return self._finish(MaskedLMOutput(loss=loss, logits=logits, **encoded.extras()), kwargs)

    def _pooled_logits(self, inputs: Inputs, kwargs: dict) -> tuple[torch.Tensor, Encoded]:
        """Logits of the first position, or of the mean over all tokens (config.classifier_pooling)."""
        if self.config.classifier_pooling == "cls":
            encoded = self._encode(inputs, Want(first_only=True), kwargs)
            return self._logits(encoded.pooled), encoded  # type: ignore[arg-type]
        ops.parallel.refuse("config.classifier_pooling='mean'", "'cls' reads the first position")
        encoded = self._encode(inputs, Want(), kwargs)
        return self._logits(self._mean(encoded.restored(), inputs)), encoded

    def _mean(self, states: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        mask = inputs.attention_mask
        if mask is None:
            return states.mean(1)
        if mask.dim() != 2:
            raise ValueError(
                "attention_mask: the mean over the tokens (config.classifier_pooling) wants (batch, length), got "
                f"{tuple(mask.shape)}"
            )
        mask = mask.to(states.device)
        return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


class _Choices(_ModernBertHeads):
    """Multiple choice: HF reads the first token that is not padding, also with padding on the left."""

    def _pooled_logits(self, inputs: Inputs, kwargs: dict) -> tuple[torch.Tensor, Encoded]:
        mask = inputs.attention_mask
        if self.config.classifier_pooling != "cls" or mask is None:
            return super()._pooled_logits(inputs, kwargs)
        if mask.dim() != 2:
            raise ValueError(f"attention_mask: wanted (batch, choices, length), got {tuple(mask.shape)} of all choices")
        first = mask.to(inputs.source().device).argmax(-1)  # 0 for a row of padding
        read = F.one_hot(first, mask.shape[1]).bool()
        encoded = self._encode(inputs, Want(read=read), kwargs)
        states = encoded.restored()
        return self._logits(states[torch.arange(len(states), device=states.device), first]), encoded


def _head_forward(hf_class: Any, compute):
    """forward of a head with labels; compute: a method of EncoderHeads."""

    @public_forward(hf_class.forward)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ):
        if isinstance(attention_mask, dict):
            return hf_class.forward(
                self, input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, labels=labels, **kwargs
            )
        inputs = Inputs(input_ids, attention_mask, None, position_ids, inputs_embeds)
        return compute(self, inputs, labels, kwargs)

    return forward


class ModernBertForMaskedLM(_ModernBertHeads, hf.ModernBertForMaskedLM):
    __doc__ = hf.ModernBertForMaskedLM.__doc__
    forward = _head_forward(hf.ModernBertForMaskedLM, _ModernBertHeads._masked_lm)


class ModernBertForSequenceClassification(_ModernBertHeads, hf.ModernBertForSequenceClassification):
    __doc__ = hf.ModernBertForSequenceClassification.__doc__
    forward = _head_forward(hf.ModernBertForSequenceClassification, EncoderHeads._classify_sequences)


class ModernBertForTokenClassification(_ModernBertHeads, hf.ModernBertForTokenClassification):
    __doc__ = hf.ModernBertForTokenClassification.__doc__
    forward = _head_forward(hf.ModernBertForTokenClassification, EncoderHeads._classify_tokens)


class ModernBertForMultipleChoice(_Choices, hf.ModernBertForMultipleChoice):
    __doc__ = hf.ModernBertForMultipleChoice.__doc__
    forward = _head_forward(hf.ModernBertForMultipleChoice, EncoderHeads._choose)


class ModernBertForQuestionAnswering(_ModernBertHeads, hf.ModernBertForQuestionAnswering):
    __doc__ = hf.ModernBertForQuestionAnswering.__doc__

    @public_forward(hf.ModernBertForQuestionAnswering.forward)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs,
    ):
        if isinstance(attention_mask, dict):
            return hf.ModernBertForQuestionAnswering.forward(
                self, input_ids, attention_mask, position_ids, start_positions, end_positions,
                inputs_embeds=inputs_embeds, **kwargs,
            )  # fmt: skip
        inputs = Inputs(input_ids, attention_mask, None, position_ids, inputs_embeds)
        return self._find_spans(inputs, start_positions, end_positions, kwargs)
