"""mBART and mBART-50 (Liu et al., 2020; Tang et al., 2020), every head: BART with norms before its sublayers."""

import torch
from transformers.models.mbart import modeling_mbart as hf

from ..generation import GenerationMixin
from ._bart import (
    BartDecoderBase,
    BartEncoderBase,
    BartLayer,
    LearnedPositions,
)
from ._base import Adopted
from ._forward import public_forward
from ._layer import AttentionModule
from ._seq2seq import Seq2SeqModel, Shifts, wrap_right
from ._seq2seq_heads import CausalLMHead, ClassificationHead, LMHead, QuestionHead

__all__ = [
    "MBartForCausalLM",
    "MBartForConditionalGeneration",
    "MBartForQuestionAnswering",
    "MBartForSequenceClassification",
    "MBartModel",
]

_ADOPTED = Adopted()


@_ADOPTED.register
class MBartEncoderLayer(BartLayer, hf.MBartEncoderLayer):
    pass


@_ADOPTED.register
class MBartDecoderLayer(BartLayer, hf.MBartDecoderLayer):
    pass


@_ADOPTED.register
class MBartAttention(AttentionModule, hf.MBartAttention):
    pass


@_ADOPTED.register
class MBartEncoder(LearnedPositions, BartEncoderBase, hf.MBartEncoder):
    _adopted = _ADOPTED
    _pre_norm = True
    forward = public_forward(hf.MBartEncoder.forward)(BartEncoderBase.forward)


@_ADOPTED.register
class MBartDecoder(LearnedPositions, BartDecoderBase, hf.MBartDecoder):
    _adopted = _ADOPTED
    _pre_norm = True
    forward = public_forward(hf.MBartDecoder.forward)(BartDecoderBase.forward)


class _WrapsLanguage(Shifts):
    """decoder_input_ids begin with the language code, which is the last token of the labels."""

    def _shifted(self, tokens: torch.Tensor) -> torch.Tensor:
        return wrap_right(self.config, tokens)


@_ADOPTED.register
class MBartModel(_WrapsLanguage, Seq2SeqModel, hf.MBartModel):
    __doc__ = hf.MBartModel.__doc__
    _adopted = _ADOPTED
    forward = public_forward(hf.MBartModel.forward)(Seq2SeqModel.forward)
    _starts_with_input = True


class MBartForConditionalGeneration(GenerationMixin, _WrapsLanguage, LMHead, hf.MBartForConditionalGeneration):
    __doc__ = hf.MBartForConditionalGeneration.__doc__
    _adopted = _ADOPTED
    forward = public_forward(hf.MBartForConditionalGeneration.forward)(LMHead.forward)


class MBartForCausalLM(GenerationMixin, CausalLMHead, hf.MBartForCausalLM):
    __doc__ = hf.MBartForCausalLM.__doc__
    _adopted = _ADOPTED
    forward = public_forward(hf.MBartForCausalLM.forward)(CausalLMHead.forward)


class MBartForSequenceClassification(ClassificationHead, hf.MBartForSequenceClassification):
    __doc__ = hf.MBartForSequenceClassification.__doc__
    _adopted = _ADOPTED
    forward = public_forward(hf.MBartForSequenceClassification.forward)(ClassificationHead.forward)


class MBartForQuestionAnswering(QuestionHead, hf.MBartForQuestionAnswering):
    __doc__ = hf.MBartForQuestionAnswering.__doc__
    _adopted = _ADOPTED
    forward = public_forward(hf.MBartForQuestionAnswering.forward)(QuestionHead.forward)
