"""What the encoder-decoder families share: two stacks, how they are joined, and the heads on the decoder."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
    Seq2SeqQuestionAnsweringModelOutput,
    Seq2SeqSequenceClassifierOutput,
)
from transformers.utils import logging

from .. import ops
from .._transformers import CACHE_NAME, cached
from ..generation import StepDescription
from ..layers import Packing, SlotTable, TransformerSpec, plan_call, run_layers
from ..layers.embeddings import check_indices
from ..layers.projection import dropout_p, is_plain, linear
from ._base import Encoded, ModelMixin, Want, check_inputs, read_flags
from ._heads import IGNORE, classification_loss, kept_positions, span_loss
from ._layer import kept_layers

__all__ = [
    "CausalLMHead",
    "ClassificationHead",
    "DecoderInputs",
    "LMHead",
    "QuestionHead",
    "Seq2SeqBase",
    "Seq2SeqModel",
    "Shifts",
    "StackBase",
    "describe_decoder",
    "wrap_right",
]

logger = logging.get_logger(__name__)


class StackBase(ModelMixin):
    """For the encoder and the decoder of a family, each a module of its own in HF's tree. A family says where its
    layers are, what they compute, and what comes before the first and after the last."""

    config: Any
    embed_tokens: Any
    training: bool

    def _layers(self) -> nn.ModuleList:
        raise NotImplementedError

    def _slots(self) -> SlotTable:
        raise NotImplementedError

    def _spec(self, causal: bool) -> TransformerSpec:
        raise NotImplementedError

    def _embed(self, packing: Packing, input_ids, inputs_embeds, past) -> torch.Tensor:
        raise NotImplementedError

    def _close(self, rows: torch.Tensor) -> torch.Tensor:
        """What follows the last layer."""
        return rows

    def _relative_bias(self, causal: bool) -> ops.RelativeBias | None:
        return None

    def _most_positions(self) -> int | None:
        """How many positions there are embeddings for; None: any number."""
        return None

    def _step_parts(self) -> dict[str, Any]:
        """What a StepDescription of this decoder has beside its layers, token embedding and head."""
        raise NotImplementedError

    def _run(
        self, want: Want, is_decoder: bool, input_ids, attention_mask, inputs_embeds, kwargs: dict, *,
        encoder_states=None, encoder_packing: Packing | None = None, encoder_mask=None, past_key_values=None,
        use_cache: bool = False,
    ) -> Encoded:  # fmt: skip
        prefix = "decoder_" if is_decoder and self.config.is_encoder_decoder else ""
        source = check_inputs(input_ids, inputs_embeds, self.config.d_model, prefix)
        batch, length = source.shape[:2]
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        self._check(input_ids, length, past, prefix)
        layers = self._kept_layers()
        flags = read_flags(self.config, kwargs, len(layers))
        causal = kwargs.get("is_causal", getattr(self.config, "is_causal", None))
        causal = is_decoder if causal is None else bool(causal)
        call = plan_call(
            self._spec(causal), attention_mask, batch, length, source.device, past_key_values=past_key_values,
            encoder_states=encoder_states, encoder_mask=encoder_mask, encoder_packing=encoder_packing,
            relative_bias=self._relative_bias(is_decoder), read=want.read, attentions=flags.attentions,
        )  # fmt: skip
        rows = self._embed(call.packing, input_ids, inputs_embeds, past)
        rows = run_layers(layers, rows, call, past_key_values=past_key_values, keep_hidden=flags.keep_hidden)
        return Encoded.of(
            self._close(rows), call, None, past_key_values if use_cache else None, flags, len(layers)
        )  # fmt: skip

    def _check(self, input_ids, length: int, past, prefix: str) -> None:
        if input_ids is not None:
            check_indices(f"{prefix}input_ids", input_ids, self.embed_tokens.weight.shape[0], "the vocabulary")
        most = self._most_positions()
        if most is not None and isinstance(past, int) and past + length > most:
            raise ValueError(
                f"{prefix}input_ids: {past + length} positions are past config.max_position_embeddings = {most}; "
                "truncate the text (tokenizer(..., truncation=True))"
            )

    def _kept_layers(self) -> list[nn.Module]:
        """Those that this call runs."""
        return kept_layers(self, self._layers())

    def _encode(self, want: Want | None, input_ids, attention_mask, inputs_embeds, kwargs):
        """An encoder's forward: Encoded when one of our models asks, else HF's output."""
        encoded = self._run(want or Want(), False, input_ids, attention_mask, inputs_embeds, kwargs)
        if want is not None:
            return encoded
        return self._finish(self._encoder_output(encoded), kwargs)

    def _encoder_output(self, encoded: Encoded):
        return BaseModelOutput(last_hidden_state=encoded.restored(), **encoded.extras())

    def _decode(
        self, want: Want | None, input_ids, attention_mask, encoder_states, encoder_mask, past_key_values,
        inputs_embeds, use_cache, kwargs,
    ):  # fmt: skip
        """A decoder's forward: Encoded when one of our models asks, else HF's output."""
        packing = kwargs.pop("encoder_packing", None)
        past_key_values, use_cache = self._cache(past_key_values, use_cache, encoder_states is not None)
        encoded = self._run(
            want or Want(), True, input_ids, attention_mask, inputs_embeds, kwargs, encoder_states=encoder_states,
            encoder_packing=packing, encoder_mask=encoder_mask, past_key_values=past_key_values, use_cache=use_cache,
        )  # fmt: skip
        if want is not None:
            return encoded
        output = BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=encoded.restored(), **cached(encoded.past_key_values), **encoded.extras(cross=True)
        )
        return self._finish(output, kwargs)

    def _cache(self, past_key_values, use_cache: bool | None, cross: bool):
        """HF's rule for when a decoder makes and returns a cache; but in training only where it is asked for: a cache
        forbids dropping padding."""
        config, checkpointing = self.config, getattr(self, "gradient_checkpointing", False)
        if use_cache is None:
            use_cache = bool(config.use_cache) and (past_key_values is not None or not self.training)
        if use_cache and checkpointing and self.training:
            logger.warning_once("use_cache=True does not go with gradient checkpointing: use_cache=False is used.")
            return None, False
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=config)
            if cross or config.is_encoder_decoder:
                past_key_values = EncoderDecoderCache(past_key_values, DynamicCache(config=config))
        return past_key_values, use_cache or past_key_values is not None


def describe_decoder(model: nn.Module, decoder: Any, head: nn.Module, cross: bool = True, **head_parts: Any):
    """The decoder for the generation engine; without `cross`, as one that never sees an encoder."""
    slots = decoder._slots()
    layers = [slots.read(layer) for layer in decoder._layers()]
    if not cross:
        nothing = dict.fromkeys((f"cross_{part}" for part in ("query", "key", "value", "output", "norm")), None)
        layers = [w._replace(**nothing) for w in layers]
    return StepDescription(
        model, layers, decoder._spec(True), decoder.embed_tokens, head, **decoder._step_parts(), **head_parts
    )  # fmt: skip


class DecoderInputs(NamedTuple):
    """The arguments of an encoder-decoder's forward, by HF's names; ids and masks (B, S), embeddings (B, S, E)."""

    input_ids: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    decoder_input_ids: torch.Tensor | None = None
    decoder_attention_mask: torch.Tensor | None = None
    encoder_outputs: Any = None
    past_key_values: Any = None
    inputs_embeds: torch.Tensor | None = None
    decoder_inputs_embeds: torch.Tensor | None = None
    use_cache: bool | None = None

    def starting_with(
        self, shifted: Callable[[torch.Tensor], torch.Tensor], tokens: torch.Tensor | None
    ) -> "DecoderInputs":
        """With decoder_input_ids = shifted(tokens), of labels or of the encoder's own, where none were given."""
        if self.decoder_input_ids is not None or self.decoder_inputs_embeds is not None:
            return self
        if tokens is None:
            raise ValueError("decoder_input_ids: wanted them, or decoder_inputs_embeds, or input_ids, got none")
        return self._replace(decoder_input_ids=shifted(tokens))


def shift_right(config, tokens: torch.Tensor) -> torch.Tensor:
    """Tokens (B, S) one position later, behind config.decoder_start_token_id; -100 becomes config.pad_token_id."""
    ops.parallel.refuse("decoder_input_ids: the token before a position", "give the part of decoder_input_ids too")
    start, padding = (_special_token(config, name) for name in ("decoder_start_token_id", "pad_token_id"))
    shifted = tokens.roll(1, -1)
    shifted[..., 0] = start
    return shifted.masked_fill_(shifted == IGNORE, padding)


def wrap_right(config, tokens: torch.Tensor) -> torch.Tensor:
    """Tokens (B, S) one position later, behind the last of each row that is not padding: mBART's language code."""
    padding = _special_token(config, "pad_token_id")
    tokens = tokens.masked_fill(tokens == IGNORE, padding)
    last = (tokens != padding).sum(1, keepdim=True) - 1
    return torch.cat((tokens.gather(1, last.clamp(min=0)), tokens[:, :-1]), 1)


def _special_token(config, name: str) -> int:
    token = getattr(config, name)
    if token is None:
        raise ValueError(f"config.{name}: wanted a token to make decoder_input_ids with, got None")
    return token


class Joined(NamedTuple):
    """What both stacks gave: the decoder's before padding is restored, and the encoder's as an output of HF's."""

    decoder: Encoded
    encoder: Any

    def extras(self) -> dict:
        """The fields that outputs of encoder-decoders have in common, by HF's names."""
        decoder, encoder = self
        return {
            CACHE_NAME: decoder.past_key_values,
            "decoder_hidden_states": decoder.hidden_states,
            "decoder_attentions": decoder.attentions,
            "cross_attentions": decoder.cross_attentions,
            "encoder_last_hidden_state": encoder.last_hidden_state,
            "encoder_hidden_states": encoder.hidden_states,
            "encoder_attentions": encoder.attentions,
        }


class Shifts(ModelMixin):
    """For models that make decoder_input_ids of other tokens."""

    config: Any

    def _shifted(self, tokens: torch.Tensor) -> torch.Tensor:
        return shift_right(self.config, tokens)


class Seq2SeqBase(Shifts):
    """For the module that owns `encoder` and `decoder`."""

    encoder: Any
    decoder: Any

    def _join(self, given: DecoderInputs, want: Want, kwargs: dict) -> Joined:
        options = {k: v for k, v in kwargs.items() if k != "return_dict"}
        mask, packing, outputs = given.attention_mask, None, given.encoder_outputs
        if outputs is None:
            encoded = self.encoder(given.input_ids, mask, inputs_embeds=given.inputs_embeds, want=Want(), **options)
            states = encoded.rows
            if mask is None or mask.dim() == 2:
                packing = encoded.packing
            outputs = BaseModelOutput(last_hidden_state=encoded.restored(), **encoded.extras())
        else:
            if not isinstance(outputs, BaseModelOutput):
                outputs = BaseModelOutput(*outputs[:3])
            states = outputs.last_hidden_state
        decoded = self.decoder(
            given.decoder_input_ids, given.decoder_attention_mask, encoder_hidden_states=states,
            encoder_attention_mask=mask, past_key_values=given.past_key_values,
            inputs_embeds=given.decoder_inputs_embeds, use_cache=given.use_cache, want=want, encoder_packing=packing,
            **options,
        )  # fmt: skip
        return Joined(decoded, outputs)

    def _joined_output(self, joined: Joined, kwargs: dict):
        output = Seq2SeqModelOutput(last_hidden_state=joined.decoder.restored(), **joined.extras())
        return self._finish(output, kwargs)


# ---- heads -----------------------------------------------------------------------------------------
def _vocabulary_rows(head: Any, bias: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
    """rows W^T + bias; bias: (1, V), beside the head's own."""
    if bias is None:
        return linear(head, rows)
    if is_plain(head, nn.Linear) and head.bias is None and bias.dtype == head.weight.dtype:
        return ops.linear(rows, head.weight, bias[0])
    return linear(head, rows) + bias.to(rows.device)


def vocabulary_loss(
    head: nn.Module, bias: torch.Tensor | None, encoded: Encoded, labels: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(mean cross entropy over the labels that are not -100, or None; logits (B, S, V), zeros where nothing is)."""
    packing = encoded.packing
    logits = _vocabulary_rows(head, bias, encoded.rows)
    if labels is None:
        return None, packing.unpack(logits)
    if tuple(labels.shape) != (packing.batch, packing.length):
        raise ValueError(f"labels: wanted shape {(packing.batch, packing.length)}, got {tuple(labels.shape)}")
    target = packing.pack(labels.to(logits.device)).reshape(-1)
    loss = ops.cross_entropy(logits.reshape(-1, logits.shape[-1]), target, ignore_index=IGNORE).to(logits.dtype)
    return loss, packing.unpack(logits)


class Seq2SeqModel(Seq2SeqBase):
    """The base model of a family: both stacks, no head."""

    _starts_with_input = False  # decoder_input_ids are made of input_ids where none are given

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
        use_cache: bool | None = None,
        **kwargs,
    ):
        """As HF's; padding is dropped where a mask says so, and the outputs are zeros there."""
        want = kwargs.pop("want", None)
        given = DecoderInputs(
            input_ids, attention_mask, decoder_input_ids, decoder_attention_mask, encoder_outputs, past_key_values,
            inputs_embeds, decoder_inputs_embeds, use_cache,
        )  # fmt: skip
        if self._starts_with_input:
            given = given.starting_with(self._shifted, input_ids)
        joined = self._join(given, want or Want(), kwargs)
        return joined if want is not None else self._joined_output(joined, kwargs)


class LMHead(Shifts):
    """A language modelling head on the decoder of an encoder-decoder."""

    lm_head: nn.Module

    def _lm_output(self, joined: Joined, labels: torch.Tensor | None, bias: torch.Tensor | None, kwargs: dict):
        loss, logits = vocabulary_loss(self.lm_head, bias, joined.decoder, labels)
        return self._finish(Seq2SeqLMOutput(loss=loss, logits=logits, **joined.extras()), kwargs)


class CausalLMHead(ModelMixin):
    """A family's decoder alone as a language model. HF's labels are not shifted here."""

    config: Any
    model: Any
    lm_head: nn.Module

    def _causal_lm(self, decoder_call: dict, labels, logits_to_keep, kwargs: dict):
        options = {k: v for k, v in kwargs.items() if k != "return_dict"}
        source = check_inputs(decoder_call["input_ids"], decoder_call["inputs_embeds"], self.config.d_model)
        read = kept_positions(source, logits_to_keep, labels)
        encoded = self.model.decoder(**decoder_call, want=Want(read=read), **options)
        kept = encoded
        if not isinstance(logits_to_keep, int) or logits_to_keep:
            which = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            rows = encoded.restored()[:, which]
            kept = encoded._replace(rows=rows, packing=Packing(*rows.shape[:2]))
        loss, logits = vocabulary_loss(self.lm_head, None, kept, labels)
        output = CausalLMOutputWithCrossAttentions(
            loss=loss, logits=logits, **cached(encoded.past_key_values), **encoded.extras(cross=True)
        )
        return self._finish(output, kwargs)


class ClassificationHead(Shifts):
    """Classification of sequences by the decoder's state at their last end-of-sequence token."""

    config: Any
    classification_head: Any

    def _check_ends(self, input_ids: torch.Tensor | None) -> torch.Tensor:
        """(B, S) bool: the end-of-sequence tokens, equally many and at least one in each row."""
        ops.parallel.refuse(f"{type(self).__name__}: the last end token", "classify with whole sequences")
        if input_ids is None:
            raise NotImplementedError(f"inputs_embeds: {type(self).__name__} looks for end tokens in input_ids")
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

    def _classification_output(self, joined: Joined, ends: torch.Tensor, labels, kwargs: dict):
        states = joined.decoder.restored()
        chosen = states[ends.to(states.device)].view(states.shape[0], -1, states.shape[-1])[:, -1]
        head = self.classification_head
        x = linear(head.dense, ops.dropout(chosen, dropout_p(head.dropout))).tanh()
        logits = linear(head.out_proj, ops.dropout(x, dropout_p(head.dropout)))
        loss = None if labels is None else classification_loss(self.config, logits, labels)
        return self._finish(Seq2SeqSequenceClassifierOutput(loss=loss, logits=logits, **joined.extras()), kwargs)


class QuestionHead(Shifts):
    """First and last token of an answer, scored at the decoder's positions."""

    qa_outputs: nn.Module

    @staticmethod
    def _question_want(given: DecoderInputs, scored: bool) -> Want:
        """Padding is computed where the loss counts it, as HF's does."""
        mask = given.decoder_attention_mask
        if not scored or mask is None or mask.dim() != 2:
            return Want()
        return Want(read=torch.ones_like(mask, dtype=torch.bool))

    def _question_output(self, joined: Joined, start_positions, end_positions, kwargs: dict):
        logits = linear(self.qa_outputs, joined.decoder.rows)
        logits = joined.decoder.packing.unpack(logits, fill=torch.finfo(logits.dtype).min)
        start, end = (t.squeeze(-1).contiguous() for t in logits.split(1, dim=-1))
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = span_loss(start, end, start_positions, end_positions)
        output = Seq2SeqQuestionAnsweringModelOutput(loss=loss, start_logits=start, end_logits=end, **joined.extras())
        return self._finish(output, kwargs)
