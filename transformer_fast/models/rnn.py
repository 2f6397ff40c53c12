"""The recurrent encoder-decoder (Sutskever et al., 2014; Cho et al., 2014), and with attention (Bahdanau et al., 2015;
Luong et al., 2015), on PreTrainedModel.

Hugging Face has no such class: the configuration and the checkpoints are this package's own.
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM
from transformers.generation import GenerationMixin as HFGenerationMixin
from transformers.modeling_outputs import Seq2SeqLMOutput, Seq2SeqModelOutput
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .. import ops
from .._transformers import CACHE_NAME, cached
from ..backends import without_kernels
from ..generation import GenerationMixin
from ..generation.native_recurrent_step import RecurrentDescription
from ..layers.embeddings import check_indices, look_up
from ..layers.projection import dropout_p, linear
from ..layers.stock import hooks_on
from ._base import check_integers
from ._forward import public_forward
from ._recurrent import (
    AttentionRNNDecoder,
    AttentionRNNEncoder,
    AttentionRNNEncoderOutput,
    AttentionRNNPreTrainedModel,
    Score,
    source_mask,
)
from ._recurrent_config import SCORES, AttentionRNNConfig
from ._recurrent_state import RecurrentState
from ._self_check import runs_as_hugging_face
from ._seq2seq import shift_right
from ._sequence_loss import sequence_loss

__all__ = [
    "SCORES",
    "AttentionRNNConfig",
    "AttentionRNNForConditionalGeneration",
    "AttentionRNNModel",
    "RecurrentState",
]


class AttentionRNNModel(AttentionRNNPreTrainedModel):
    """Encoder and decoder without the projection to the vocabulary."""

    def __init__(self, config: AttentionRNNConfig):
        super().__init__(config)
        self.encoder = AttentionRNNEncoder(config)
        self.decoder = AttentionRNNDecoder(config)
        self.post_init()

    def get_input_embeddings(self):
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value):
        self.encoder.embed_tokens = value

    @public_forward()
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: RecurrentState | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> Seq2SeqModelOutput:
        """Encode the source, and run the decoder over the target's words; arguments as in HF's encoder-decoders.

        Args:
            input_ids: (B, Sk) int32 or int64, the source.
            attention_mask: (B, Sk), nonzero for the source's tokens.
            decoder_input_ids: (B, T) int32 or int64, the target's words before each step.
            encoder_outputs: the encoder's output, in place of input_ids.
            past_key_values: a RecurrentState to continue from, advanced in place.
            inputs_embeds: (B, Sk, embedding_size), in place of input_ids.
            decoder_inputs_embeds: (B, T, embedding_size), in place of decoder_input_ids.
            use_cache: also return the decoder's state; default: the configuration's.
            output_attentions: also return the attention weights.

        Returns:
            Seq2SeqModelOutput: last_hidden_state is the readout, (B, T, config.readout_size); cross_attentions has one
            tensor, (B, 1, T, Sk).

        Raises:
            TypeError, ValueError: if an argument is invalid; the message names it, its value and what is expected.
        """
        config = self.config
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids, attention_mask, inputs_embeds, return_dict=True)
        elif not isinstance(encoder_outputs, ModelOutput):
            encoder_outputs = AttentionRNNEncoderOutput(*encoder_outputs)
        if (decoder_input_ids is None) == (decoder_inputs_embeds is None):
            came = "neither" if decoder_input_ids is None else "both"
            raise ValueError(f"decoder_input_ids, decoder_inputs_embeds: wanted exactly one of them, got {came}")
        values = encoder_outputs.last_hidden_state
        if decoder_inputs_embeds is None:
            ids: Any = decoder_input_ids
            check_integers("decoder_input_ids", ids)
            check_indices("decoder_input_ids", ids, config.vocab_size, "config.vocab_size")
            decoder_inputs_embeds = look_up(self.decoder.embed_tokens, ids)
        if decoder_inputs_embeds.shape[0] != values.shape[0] or not decoder_inputs_embeds.shape[1]:
            raise ValueError(
                f"decoder_input_ids: wanted shape ({values.shape[0]}, at least 1) for input_ids of "
                f"{tuple(values.shape[:2])}, got {tuple(decoder_inputs_embeds.shape[:2])}"
            )
        mask = source_mask(attention_mask, *values.shape[:2])
        state = self.decoder.start(encoder_outputs) if past_key_values is None else past_key_values
        weights = config.output_attentions if output_attentions is None else output_attentions
        readout, found = self.decoder(
            ops.dropout(decoder_inputs_embeds, dropout_p(self.decoder.dropout)), values,
            None if mask is None else mask[:, None], state, bool(weights),
        )  # fmt: skip
        keep = config.use_cache if use_cache is None else use_cache
        return Seq2SeqModelOutput(
            last_hidden_state=readout,
            **cached(state if keep else None),
            cross_attentions=(found.unsqueeze(1),) if found is not None else None,  # type: ignore[arg-type]
            encoder_last_hidden_state=values,
        )


class AttentionRNNForConditionalGeneration(GenerationMixin, AttentionRNNPreTrainedModel, HFGenerationMixin):
    """The encoder-decoder with scores over the target vocabulary; `generate` has Hugging Face's signature."""

    _tied_weights_keys = {"lm_head.weight": "model.decoder.embed_tokens.weight"}

    def __init__(self, config: AttentionRNNConfig):
        super().__init__(config)
        self.model = AttentionRNNModel(config)
        self.lm_head = nn.Linear(config.readout_size, config.vocab_size)
        self.post_init()
        self.runs_as_hugging_face = runs_as_hugging_face(type(self))

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # forward makes a RecurrentState itself

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        return shift_right(self.config, labels)

    def recurrent_step(
        self, tokens: torch.Tensor, state: RecurrentState, values: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Logits (B, vocab_size) after tokens (B,); advances `state` in place. values: (B, Sk, hidden_size), the
        encoder's states; mask: (B, Sk). Does what forward does, without the work of a first step."""
        decoder = self.model.decoder
        words = ops.dropout(decoder.embed_tokens(tokens[:, None]), dropout_p(decoder.dropout))
        readout, _ = decoder(words, values, None if mask is None else (mask != 0)[:, None], state)
        return linear(self.lm_head, readout[:, 0])

    def recurrent_description(self) -> RecurrentDescription:
        """The parts of this model that the native decoding step replaces."""
        decoder, refused = self.model.decoder, ""
        score = decoder.score
        step = AttentionRNNForConditionalGeneration.recurrent_step
        if type(self).recurrent_step is not step or "recurrent_step" in vars(self):
            refused = "the model has a recurrent_step of its own"
        for module, kind in ((decoder, AttentionRNNDecoder), (score, Score)):
            if type(module) is not kind:
                refused = f"the model has a {type(module).__name__} in place of {kind.__name__}"
        return RecurrentDescription(
            (decoder, self.lm_head), decoder.embed_tokens, decoder.rnn, self.lm_head, score.query, score.weight,
            decoder.readout, decoder.maxout, decoder.attends, self._start, refused,
        )  # fmt: skip

    def _start(self, encoded: Any) -> RecurrentState:
        return self.model.decoder.start(
            encoded if isinstance(encoded, ModelOutput) else AttentionRNNEncoderOutput(*encoded)
        )

    def why_hf_loop(self) -> str:
        """'' if generate may decode with our engine, which calls no forward after the prompt; else why not."""
        for module, kind in ((self, AttentionRNNForConditionalGeneration), (self.model, AttentionRNNModel)):
            name = type(module).__name__
            if type(module).forward is not kind.forward or "forward" in vars(module):
                return f"{name} has a forward of its own"
            if hooks := hooks_on(module):
                return f"{name} has {hooks}"
        return ""

    def explain(self) -> str:
        """How generate decodes with this model, and what prevents a faster way; see transformer_fast.explain."""
        if reason := self.why_hf_loop():
            how = f"transformers' own loop, as {reason}"
        elif reason := self.recurrent_description().why_not():
            how = f"this package's engine, module by module, as {reason}"
        else:
            how = "this package's engine, one native call per token"
        lines = [type(self).__name__, "  forward: the fast path, which is the only one", f"  generate: {how}"]
        return "\n".join([*lines, *filter(None, [without_kernels(self)])])

    def _sampled_inputs(
        self, ids, mask, targets, encoder_outputs, inputs_embeds, labels, output_attentions, num_items_in_batch
    ) -> Seq2SeqLMOutput:
        """forward in training with teacher_forcing below 1: one step at a time, because the input may be the output of
        the previous step."""
        if encoder_outputs is None:
            encoder_outputs = self.model.encoder(ids, mask, inputs_embeds, return_dict=True)
        state, words = None, targets[:, :1]
        logits: list[torch.Tensor] = []
        weights: list[torch.Tensor] = []
        for step in range(targets.shape[1]):
            if step:
                right = torch.rand(targets.shape[0], 1, device=targets.device) < self.config.teacher_forcing
                words = torch.where(right, targets[:, step : step + 1], logits[-1].detach().argmax(-1))
            output = self.model(
                attention_mask=mask, decoder_input_ids=words, encoder_outputs=encoder_outputs, past_key_values=state,
                use_cache=True, output_attentions=output_attentions, return_dict=True,
            )  # fmt: skip
            weights += output.cross_attentions or ()
            state = getattr(output, CACHE_NAME)
            logits.append(linear(self.lm_head, output.last_hidden_state))
        scores = torch.cat(logits, 1)
        loss = sequence_loss(scores, labels, self.config.label_smoothing, num_items_in_batch)
        return Seq2SeqLMOutput(
            loss=loss,
            logits=scores,
            cross_attentions=(torch.cat(weights, 2),) if weights else None,  # type: ignore[arg-type]
            encoder_last_hidden_state=encoder_outputs[0],
        )

    @public_forward()
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: RecurrentState | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: int | torch.Tensor | None = None,
        **kwargs,
    ) -> Seq2SeqLMOutput:
        """Score every word of the target's vocabulary at each step. Other arguments: as AttentionRNNModel.

        Args:
            labels: (B, T) int64, -100 to ignore; decoder_input_ids are made from them if none are given.
            logits_to_keep: compute the last so many steps, or those of these indices; 0: all.
            num_items_in_batch: divides the sum of the losses, in place of the number of labels (`Trainer`).

        Returns:
            Seq2SeqLMOutput with logits (B, T, vocab_size), and the loss if there are labels.
        """
        if labels is not None:
            use_cache = False
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
            forced = self.config.teacher_forcing == 1 or not self.training
            if not forced and decoder_input_ids is not None and past_key_values is None:
                return self._sampled_inputs(
                    input_ids, attention_mask, decoder_input_ids, encoder_outputs, inputs_embeds, labels,
                    output_attentions, num_items_in_batch,
                )  # fmt: skip
        output = self.model(
            input_ids, attention_mask, decoder_input_ids, encoder_outputs, past_key_values, inputs_embeds,
            decoder_inputs_embeds, use_cache, output_attentions, return_dict=True,
        )  # fmt: skip
        rows = output.last_hidden_state
        if not isinstance(logits_to_keep, int) or logits_to_keep:
            rows = rows[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]
        logits = linear(self.lm_head, rows)
        loss = None
        if labels is not None:
            loss = sequence_loss(logits, labels, self.config.label_smoothing, num_items_in_batch)
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            **cached(output.past_key_values),
            cross_attentions=output.cross_attentions,
            encoder_last_hidden_state=output.encoder_last_hidden_state,
        )


AutoConfig.register(AttentionRNNConfig.model_type, AttentionRNNConfig, exist_ok=True)
AutoModel.register(AttentionRNNConfig, AttentionRNNModel, exist_ok=True)
AutoModelForSeq2SeqLM.register(AttentionRNNConfig, AttentionRNNForConditionalGeneration, exist_ok=True)
