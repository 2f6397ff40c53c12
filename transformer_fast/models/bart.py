"""BART (Lewis et al., 2020), every head: HF's parameters and names, our computation."""

from transformers.models.bart import modeling_bart as hf

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
from ._seq2seq import Seq2SeqModel
from ._seq2seq_heads import CausalLMHead, ClassificationHead, LMHead, QuestionHead

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


@_ADOPTED.register
class BartEncoder(LearnedPositions, BartEncoderBase, hf.BartEncoder):
    _adopted = _ADOPTED
    forward = public_forward(hf.BartEncoder.forward)(BartEncoderBase.forward)


@_ADOPTED.register
class BartDecoder(LearnedPositions, BartDecoderBase, hf.BartDecoder):
    _adopted = _ADOPTED
    forward = public_forward(hf.BartDecoder.forward)(BartDecoderBase.forward)


@_ADOPTED.register
class BartModel(Seq2SeqModel, hf.BartModel):
    __doc__ = hf.BartModel.__doc__
    _adopted = _ADOPTED
    forward = public_forward(hf.BartModel.forward)(Seq2SeqModel.forward)
    _starts_with_input = True


class BartForConditionalGeneration(GenerationMixin, LMHead, hf.BartForConditionalGeneration):
    __doc__ = hf.BartForConditionalGeneration.__doc__
    _adopted = _ADOPTED
    forward = public_forward(hf.BartForConditionalGeneration.forward)(LMHead.forward)


class BartForCausalLM(GenerationMixin, CausalLMHead, hf.BartForCausalLM):
    __doc__ = hf.BartForCausalLM.__doc__
    _adopted = _ADOPTED
    forward = public_forward(hf.BartForCausalLM.forward)(CausalLMHead.forward)


class BartForSequenceClassification(ClassificationHead, hf.BartForSequenceClassification):
    __doc__ = hf.BartForSequenceClassification.__doc__
    _adopted = _ADOPTED
    forward = public_forward(hf.BartForSequenceClassification.forward)(ClassificationHead.forward)


class BartForQuestionAnswering(QuestionHead, hf.BartForQuestionAnswering):
    __doc__ = hf.BartForQuestionAnswering.__doc__
    _adopted = _ADOPTED
    forward = public_forward(hf.BartForQuestionAnswering.forward)(QuestionHead.forward)
