"""UMT5 (Chung et al., 2023), every head: T5 v1.1 with a table of relative positions in every layer."""

from transformers.models.umt5 import modeling_umt5 as hf

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
    slot_tables,
)

__all__ = [
    "UMT5EncoderModel",
    "UMT5ForConditionalGeneration",
    "UMT5ForQuestionAnswering",
    "UMT5ForSequenceClassification",
    "UMT5ForTokenClassification",
    "UMT5Model",
]

SLOTS = slot_tables(relative_bias="layer.0.SelfAttention.relative_attention_bias")
_ADOPTED = Adopted()


@_ADOPTED.register
class UMT5LayerNorm(T5NormBase, hf.UMT5LayerNorm):
    is_rms_norm = True


@_ADOPTED.register
class UMT5Block(T5BlockBase, hf.UMT5Block):
    _tables = SLOTS


@_ADOPTED.register
class UMT5Attention(AttentionModule, hf.UMT5Attention):
    _averages = True


@_ADOPTED.register
class UMT5Stack(T5StackBase, hf.UMT5Stack):
    _adopted = _ADOPTED
    _tables = SLOTS
    forward = public_forward(hf.UMT5Stack.forward)(T5StackBase.forward)


@_ADOPTED.register
class UMT5Model(Seq2SeqModel, hf.UMT5Model):
    __doc__ = hf.UMT5Model.__doc__
    _adopted = _ADOPTED
    forward = public_forward(hf.UMT5Model.forward)(Seq2SeqModel.forward)


class UMT5ForConditionalGeneration(GenerationMixin, T5Generation, hf.UMT5ForConditionalGeneration):
    __doc__ = hf.UMT5ForConditionalGeneration.__doc__
    _adopted = _ADOPTED
    forward = public_forward(hf.UMT5ForConditionalGeneration.forward)(T5Generation.forward)

    def _head_scale(self) -> float:
        config = self.config
        scaled = getattr(config, "scale_decoder_outputs", config.tie_word_embeddings)  # no such field before 5.24
        return self.model_dim**-0.5 if scaled else 1.0


@_ADOPTED.register
class UMT5EncoderModel(T5Encoding, hf.UMT5EncoderModel):
    __doc__ = hf.UMT5EncoderModel.__doc__
    _adopted = _ADOPTED
    forward = public_forward(hf.UMT5EncoderModel.forward)(T5Encoding.forward)


class UMT5ForSequenceClassification(T5Classification, hf.UMT5ForSequenceClassification):
    __doc__ = hf.UMT5ForSequenceClassification.__doc__
    _adopted = _ADOPTED
    forward = public_forward(hf.UMT5ForSequenceClassification.forward)(T5Classification.forward)


class UMT5ForTokenClassification(T5Tagging, hf.UMT5ForTokenClassification):
    __doc__ = hf.UMT5ForTokenClassification.__doc__
    _adopted = _ADOPTED
    forward = public_forward(hf.UMT5ForTokenClassification.forward)(T5Tagging.forward)


class UMT5ForQuestionAnswering(T5Question, hf.UMT5ForQuestionAnswering):
    __doc__ = hf.UMT5ForQuestionAnswering.__doc__
    _adopted = _ADOPTED
    forward = public_forward(hf.UMT5ForQuestionAnswering.forward)(T5Question.forward)
