"""T5 and T5 v1.1 (Raffel et al., 2020), every head: HF's parameters and names, our computation."""

from transformers.models.t5 import modeling_t5 as hf

from ..generation import GenerationMixin
from ._base import Adopted
from ._forward import public_forward
from ._layer import AttentionModule
from ._seq2seq import Seq2SeqModel
from ._t5 import (
    T5BlockBase,
    T5Classification,
    T5Encoding,
    T5Generation,
    T5NormBase,
    T5Question,
    T5StackBase,
    T5Tagging,
)

__all__ = [
    "T5EncoderModel",
    "T5ForConditionalGeneration",
    "T5ForQuestionAnswering",
    "T5ForSequenceClassification",
    "T5ForTokenClassification",
    "T5Model",
]

_ADOPTED = Adopted()


@_ADOPTED.register
class T5LayerNorm(T5NormBase, hf.T5LayerNorm):
    is_rms_norm = True


@_ADOPTED.register
class T5Block(T5BlockBase, hf.T5Block):
    pass


@_ADOPTED.register
class T5Attention(AttentionModule, hf.T5Attention):
    _averages = True


@_ADOPTED.register
class T5Stack(T5StackBase, hf.T5Stack):
    _adopted = _ADOPTED
    forward = public_forward(hf.T5Stack.forward)(T5StackBase.forward)


@_ADOPTED.register
class T5Model(Seq2SeqModel, hf.T5Model):
    __doc__ = hf.T5Model.__doc__
    _adopted = _ADOPTED
    forward = public_forward(hf.T5Model.forward)(Seq2SeqModel.forward)


class T5ForConditionalGeneration(GenerationMixin, T5Generation, hf.T5ForConditionalGeneration):
    __doc__ = hf.T5ForConditionalGeneration.__doc__
    _adopted = _ADOPTED
    forward = public_forward(hf.T5ForConditionalGeneration.forward)(T5Generation.forward)


@_ADOPTED.register
class T5EncoderModel(T5Encoding, hf.T5EncoderModel):
    __doc__ = hf.T5EncoderModel.__doc__
    _adopted = _ADOPTED
    forward = public_forward(hf.T5EncoderModel.forward)(T5Encoding.forward)


class T5ForSequenceClassification(T5Classification, hf.T5ForSequenceClassification):
    __doc__ = hf.T5ForSequenceClassification.__doc__
    _adopted = _ADOPTED
    forward = public_forward(hf.T5ForSequenceClassification.forward)(T5Classification.forward)


class T5ForTokenClassification(T5Tagging, hf.T5ForTokenClassification):
    __doc__ = hf.T5ForTokenClassification.__doc__
    _adopted = _ADOPTED
    forward = public_forward(hf.T5ForTokenClassification.forward)(T5Tagging.forward)


class T5ForQuestionAnswering(T5Question, hf.T5ForQuestionAnswering):
    __doc__ = hf.T5ForQuestionAnswering.__doc__
    _adopted = _ADOPTED
    forward = public_forward(hf.T5ForQuestionAnswering.forward)(T5Question.forward)
