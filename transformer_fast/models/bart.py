"""BART (Lewis et al., 2020), every head: HF's parameters and names, our computation."""

from typing import Any

import torch
from transformers.models.bart import modeling_bart as hf

from ..generation import GenerationMixin
from ..layers import Packing
from ..layers.embeddings import embed
from ._bart import BartCausalLM, BartDecoderBase, BartEncoderBase, BartLayer, BartLMHead, BartSeq2Seq
from ._base import Adopted, Want
from ._forward import public_forward
from ._layer import AttentionModule
from ._seq2seq import ClassificationHead, DecoderInputs, QuestionHead

__all__ = [
    "BartForCausalLM",
    "BartForConditionalGeneration",
    "BartForQuestionAnswering",
    "BartForSequenceClassification",
    "BartModel",
]

_ADOPTED = Adopted()


@_ADOPTED.register
class BartEncoderLayer(BartLayer, hf.BartEncoderLayer):
    pass


@_ADOPTED.register
class BartDecoderLayer(BartLayer, hf.BartDecoderLayer):
    pass


@_ADOPTED.register
class BartAttention(AttentionModule, hf.BartAttention):
    pass


class _Embeddings:
    """norm(word + learned position): both stacks of BART begin so."""

    embed_tokens: Any
    embed_positions: Any
    layernorm_embedding: Any
    dropout: float
    training: bool

    def _embed(self, packing: Packing, input_ids, inputs_embeds, past) -> torch.Tensor:
        return embed(
            packing, self.embed_tokens, self._positions, None, self.layernorm_embedding,
            self.dropout if self.training else 0.0, input_ids=input_ids, inputs_embeds=inputs_embeds,
            position_ids=None, segment_ids=None, past=past,
        )  # fmt: skip

    def _step_parts(self) -> dict[str, Any]:
        positions = self.embed_positions
        return {
            "position": positions,
            "position_offset": positions.offset,
            "embed_scale": getattr(self.embed_tokens, "embed_scale", 1.0),
            "embedding_norm": self.layernorm_embedding,
        }

    def _positions(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embed_positions(None, position_ids=ids)[0]

    def _most_positions(self) -> int:
        return self.embed_positions.num_embeddings - self.embed_positions.offset


@_ADOPTED.register
class BartEncoder(_Embeddings, BartEncoderBase, hf.BartEncoder):
    _adopted = _ADOPTED
    forward = public_forward(hf.BartEncoder.forward)(BartEncoderBase.forward)


@_ADOPTED.register
class BartDecoder(_Embeddings, BartDecoderBase, hf.BartDecoder):
    _adopted = _ADOPTED
    forward = public_forward(hf.BartDecoder.forward)(BartDecoderBase.forward)


@_ADOPTED.register
class BartModel(BartSeq2Seq, hf.BartModel):
    __doc__ = hf.BartModel.__doc__
    _adopted = _ADOPTED
    forward = public_forward(hf.BartModel.forward)(BartSeq2Seq.forward)
    _starts_with_input = True


class BartForConditionalGeneration(GenerationMixin, BartLMHead, hf.BartForConditionalGeneration):
    __doc__ = hf.BartForConditionalGeneration.__doc__
    _adopted = _ADOPTED
    forward = public_forward(hf.BartForConditionalGeneration.forward)(BartLMHead.forward)


class BartForCausalLM(GenerationMixin, BartCausalLM, hf.BartForCausalLM):
    __doc__ = hf.BartForCausalLM.__doc__
    _adopted = _ADOPTED
    forward = public_forward(hf.BartForCausalLM.forward)(BartCausalLM.forward)


class BartForSequenceClassification(ClassificationHead, hf.BartForSequenceClassification):
    __doc__ = hf.BartForSequenceClassification.__doc__
    _adopted = _ADOPTED

    @public_forward(hf.BartForSequenceClassification.forward)
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
        options = {k: v for k, v in kwargs.items() if k != "return_dict"}
        joined = self.model(**given._asdict(), want=Want(read=ends), **options)
        return self._classification_output(joined, ends, labels, kwargs)


class BartForQuestionAnswering(QuestionHead, hf.BartForQuestionAnswering):
    __doc__ = hf.BartForQuestionAnswering.__doc__
    _adopted = _ADOPTED

    @public_forward(hf.BartForQuestionAnswering.forward)
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
        options = {k: v for k, v in kwargs.items() if k != "return_dict"}
        joined = self.model(**given._asdict(), want=self._question_want(given, scored), **options)
        return self._question_output(joined, start_positions, end_positions, kwargs)
