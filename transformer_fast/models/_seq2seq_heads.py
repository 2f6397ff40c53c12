"""Heads on the decoder of an encoder-decoder, with the forwards of BART, T5 and the families derived from them."""

from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import (
    CausalLMOutputWithCrossAttentions,
    Seq2SeqLMOutput,
    Seq2SeqQuestionAnsweringModelOutput,
    Seq2SeqSequenceClassifierOutput,
)

from .. import ops
from .._transformers import cached
from ..generation import StepDescription
from ..layers.projection import dropout_p, is_plain, linear
from ..ops._common import autocast_dtype
from ._base import Encoded, ModelMixin, Want, check_inputs
from ._heads import IGNORE, classification_loss, every_position, is_labelled, kept_positions, span_loss, span_scores
from ._seq2seq import DecoderInputs, Joined, Shifts, describe_decoder

__all__ = ["CausalLMHead", "ClassificationHead", "LMHead", "QuestionHead"]


def _vocabulary_rows(head: Any, bias: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
    """rows W^T + bias. bias: (1, V), added to the head's own, under autocast in its own dtype."""
    if bias is None:
        return linear(head, rows)
    fused = bias.dtype == head.weight.dtype and autocast_dtype(rows.device) is None
    if fused and is_plain(head, nn.Linear) and head.bias is None:
        return ops.linear(rows, head.weight, bias[0])
    return linear(head, rows) + bias.to(rows.device)


def _vocabulary_loss(
    head: nn.Module, bias: torch.Tensor | None, encoded: Encoded, labels: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(mean cross entropy over the labels that are not -100, or None; logits (B, S, V), zeros at dropped padding)."""
    unpadding = encoded.unpadding
    logits = _vocabulary_rows(head, bias, encoded.rows)
    if labels is None:
        return None, unpadding.pad(logits)
    if tuple(labels.shape) != (unpadding.batch, unpadding.length):
        raise ValueError(f"labels: wanted shape {(unpadding.batch, unpadding.length)}, got {tuple(labels.shape)}")
    target = unpadding.unpad(labels.to(logits.device)).reshape(-1)
    loss = ops.cross_entropy(logits.reshape(-1, logits.shape[-1]), target, ignore_index=IGNORE)
    if autocast_dtype(logits.device) is None:  # there torch's loss is in float32
        loss = loss.to(logits.dtype)
    return loss, unpadding.pad(logits)


class _Head(Shifts, ModelMixin):
    """A head on a base model. Heads that own both stacks themselves have Seq2SeqBase as an earlier base."""

    base_model: Any

    def _join(self, given: DecoderInputs, want: Want, kwargs: dict) -> Joined:
        options = {k: v for k, v in kwargs.items() if k != "return_dict"}
        return self.base_model(**given._asdict(), want=want, **options)


class LMHead(_Head):
    """A language model.

    final_logits_bias: (1, V) or None, added to the head's own bias. _caches_beside_labels: labels do not turn the cache
    off.
    """

    lm_head: nn.Module
    final_logits_bias: torch.Tensor | None
    _caches_beside_labels = False

    def _head_scale(self) -> float:
        """The factor of the decoder's states before the head."""
        return 1.0

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ):
        """As HF's. Padding is dropped where a mask marks it; logits there are zeros."""
        given = DecoderInputs(
            input_ids, attention_mask, decoder_input_ids, decoder_attention_mask, encoder_outputs, past_key_values,
            inputs_embeds, decoder_inputs_embeds,
            use_cache if labels is None or self._caches_beside_labels else False,
        )  # fmt: skip
        if labels is not None:
            given = given.starting_with(self._shifted, labels)
        joined = self._join(given, Want(read=is_labelled(labels)), kwargs)
        decoded = joined.decoder
        if (scale := self._head_scale()) != 1:
            decoded = decoded._replace(rows=decoded.rows * scale)
        loss, logits = _vocabulary_loss(self.lm_head, self.final_logits_bias, decoded, labels)
        return self._finish(Seq2SeqLMOutput(loss=loss, logits=logits, **joined.extras()), kwargs)

    def step_description(self) -> StepDescription:
        return describe_decoder(
            self, self.base_model.decoder, self.lm_head, head_bias=self.final_logits_bias,  # type: ignore[arg-type]
            head_scale=self._head_scale(),
        )  # fmt: skip


class CausalLMHead(ModelMixin):
    """A family's decoder alone as a language model. As in HF, labels are not shifted here."""

    config: Any
    model: Any
    lm_head: nn.Module

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ):
        """As HF's: labels[i] is scored at position i. Without a cache padding is dropped, and its logits are zeros."""
        options = {k: v for k, v in kwargs.items() if k != "return_dict"}
        source = check_inputs(input_ids, inputs_embeds, self.config.d_model)
        encoded = self.model.decoder(
            input_ids, attention_mask, encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask, past_key_values=past_key_values,
            inputs_embeds=inputs_embeds, use_cache=use_cache,
            want=Want(read=kept_positions(source, logits_to_keep, labels, encoder_hidden_states is not None)),
            **options,
        )  # fmt: skip
        loss, logits = _vocabulary_loss(self.lm_head, None, encoded.kept(logits_to_keep), labels)
        output = CausalLMOutputWithCrossAttentions(
            loss=loss, logits=logits, **cached(encoded.past_key_values), **encoded.extras(cross=True)
        )
        return self._finish(output, kwargs)

    def step_description(self) -> StepDescription:
        return describe_decoder(self, self.model.decoder, self.lm_head, cross=False)  # type: ignore[arg-type]


class ClassificationHead(_Head):
    """Sequence classification by the decoder's state at the last end-of-sequence token of each row."""

    classification_head: Any

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ):
        ends = self._check_ends(input_ids)
        given = DecoderInputs(
            input_ids, attention_mask, decoder_input_ids, decoder_attention_mask, encoder_outputs, None,
            inputs_embeds, decoder_inputs_embeds, use_cache if labels is None else False,
        )  # fmt: skip
        joined = self._join(self._started(given), Want(read=ends), kwargs)
        states = joined.decoder.restored()
        chosen = states[ends.to(states.device)].view(states.shape[0], -1, states.shape[-1])[:, -1]
        head = self.classification_head
        x = linear(head.dense, ops.dropout(chosen, dropout_p(head.dropout))).tanh()
        logits = linear(head.out_proj, ops.dropout(x, dropout_p(head.dropout)))
        loss = None if labels is None else classification_loss(self.config, logits, labels)
        return self._finish(Seq2SeqSequenceClassifierOutput(loss=loss, logits=logits, **joined.extras()), kwargs)

    def _check_ends(self, input_ids: torch.Tensor | None) -> torch.Tensor:
        """(B, S) bool: the end-of-sequence tokens. Checks that all rows have the same number, at least one."""
        ops.parallel.refuse(f"{type(self).__name__}: the last end token", "classify with whole sequences")
        if input_ids is None:
            raise NotImplementedError(f"inputs_embeds: {type(self).__name__} looks for end tokens; wanted input_ids")
        ends = input_ids.eq(self.config.eos_token_id)
        counts = ends.sum(1)
        if not torch.compiler.is_compiling() and ops.concrete(counts) and counts.numel():
            few, many = (int(n) for n in counts.aminmax())
            if few != many or few < 1:
                raise ValueError(
                    f"input_ids: wanted equally many end-of-sequence tokens (config.eos_token_id = "
                    f"{self.config.eos_token_id}) in every row, at least one, got {few}..{many}"
                )
        return ends


class QuestionHead(_Head):
    """Question answering: start and end of the answer, scored at the decoder's positions."""

    qa_outputs: nn.Module

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ):
        scored = start_positions is not None and end_positions is not None
        given = DecoderInputs(
            input_ids, attention_mask, decoder_input_ids, decoder_attention_mask, encoder_outputs, None,
            inputs_embeds, decoder_inputs_embeds, False if scored else use_cache,
        )  # fmt: skip
        joined = self._join(self._started(given), _question_want(decoder_attention_mask, scored), kwargs)
        start, end = span_scores(linear(self.qa_outputs, joined.decoder.rows), joined.decoder.unpadding)
        loss = span_loss(start, end, start_positions, end_positions) if scored else None
        output = Seq2SeqQuestionAnsweringModelOutput(loss=loss, start_logits=start, end_logits=end, **joined.extras())
        return self._finish(output, kwargs)


def _question_want(mask: torch.Tensor | None, scored: bool) -> Want:
    """With a loss, padding is computed too: HF's loss includes it. mask: the decoder's."""
    if not scored or mask is None or mask.dim() != 2:
        return Want()
    return Want(read=every_position(mask))
