"""mT5 (Xue et al., 2021), every head: T5 v1.1 without scaling of the states before the head."""

from transformers.models.mt5 import modeling_mt5 as hf

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
    "MT5EncoderModel",
    "MT5ForConditionalGeneration",
    "MT5ForQuestionAnswering",
    "MT5ForSequenceClassification",
    "MT5ForTokenClassification",
    "MT5Model",
]

_ADOPTED = Adopted()


@_ADOPTED.register
class MT5LayerNorm(T5NormBase, hf.MT5LayerNorm):
    is_rms_norm = True


@_ADOPTED.register
class MT5Block(T5BlockBase, hf.MT5Block):
    pass


@_ADOPTED.register
class MT5Attention(AttentionModule, hf.MT5Attention):
    _averages = True


@_ADOPTED.register
class MT5Stack(T5StackBase, hf.MT5Stack):
    _adopted = _ADOPTED
    forward = public_forward(hf.MT5Stack.forward)(T5StackBase.forward)


@_ADOPTED.register
class MT5Model(Seq2SeqModel, hf.MT5Model):
    __doc__ = hf.MT5Model.__doc__
    _adopted = _ADOPTED
    forward = public_forward(hf.MT5Model.forward)(Seq2SeqModel.forward)


class MT5ForConditionalGeneration(GenerationMixin, T5Generation, hf.MT5ForConditionalGeneration):
    __doc__ = hf.MT5ForConditionalGeneration.__doc__
    _adopted = _ADOPTED
    forward = public_forward(hf.MT5ForConditionalGeneration.forward)(T5Generation.forward)

    def _head_scale(self) -> float:
        return 1.0


@_ADOPTED.register
class MT5EncoderModel(T5Encoding, hf.MT5EncoderModel):
    __doc__ = hf.MT5EncoderModel.__doc__
    _adopted = _ADOPTED
    forward = public_forward(hf.MT5EncoderModel.forward)(T5Encoding.forward)


class MT5ForSequenceClassification(T5Classification, hf.MT5ForSequenceClassification):
    __doc__ = hf.MT5ForSequenceClassification.__doc__
    _adopted = _ADOPTED
    forward = public_forward(hf.MT5ForSequenceClassification.forward)(T5Classification.forward)


class MT5ForTokenClassification(T5Tagging, hf.MT5ForTokenClassification):
    __doc__ = hf.MT5ForTokenClassification.__doc__
    _adopted = _ADOPTED
    forward = public_forward(hf.MT5ForTokenClassification.forward)(T5Tagging.forward)


class MT5ForQuestionAnswering(T5Question, hf.MT5ForQuestionAnswering):
    __doc__ = hf.MT5ForQuestionAnswering.__doc__
    _adopted = _ADOPTED
    forward = public_forward(hf.MT5ForQuestionAnswering.forward)(T5Question.forward)
