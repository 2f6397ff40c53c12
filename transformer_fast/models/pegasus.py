"""PEGASUS (Zhang et al., 2020), every head: Marian's positions, with norms before the sublayers."""

from transformers.models.pegasus import modeling_pegasus as hf

from ..generation import GenerationMixin
from ._bart import (
    BartDecoderBase,
    BartEncoderBase,
    BartLayer,
    ScalesGivenEmbeddings,
    SinusoidalPositions,
)
from ._base import Adopted
from ._forward import public_forward
from ._layer import AttentionModule
from ._seq2seq import Seq2SeqModel
from ._seq2seq_heads import CausalLMHead, LMHead

__all__ = ["PegasusForCausalLM", "PegasusForConditionalGeneration", "PegasusModel"]

_ADOPTED = Adopted()


@_ADOPTED.register
class PegasusEncoderLayer(BartLayer, hf.PegasusEncoderLayer):
    pass


@_ADOPTED.register
class PegasusDecoderLayer(BartLayer, hf.PegasusDecoderLayer):
    pass


@_ADOPTED.register
class PegasusAttention(AttentionModule, hf.PegasusAttention):
    pass


@_ADOPTED.register
class PegasusEncoder(SinusoidalPositions, BartEncoderBase, hf.PegasusEncoder):
    _adopted = _ADOPTED
    _pre_norm = True
    forward = public_forward(hf.PegasusEncoder.forward)(BartEncoderBase.forward)


@_ADOPTED.register
class PegasusDecoder(ScalesGivenEmbeddings, BartDecoderBase, hf.PegasusDecoder):
    _adopted = _ADOPTED
    _pre_norm = True
    forward = public_forward(hf.PegasusDecoder.forward)(BartDecoderBase.forward)


@_ADOPTED.register
class PegasusModel(Seq2SeqModel, hf.PegasusModel):
    __doc__ = hf.PegasusModel.__doc__
    _adopted = _ADOPTED
    forward = public_forward(hf.PegasusModel.forward)(Seq2SeqModel.forward)


class PegasusForConditionalGeneration(GenerationMixin, LMHead, hf.PegasusForConditionalGeneration):
    __doc__ = hf.PegasusForConditionalGeneration.__doc__
    _adopted = _ADOPTED
    forward = public_forward(hf.PegasusForConditionalGeneration.forward)(LMHead.forward)


class PegasusForCausalLM(GenerationMixin, CausalLMHead, hf.PegasusForCausalLM):
    __doc__ = hf.PegasusForCausalLM.__doc__
    _adopted = _ADOPTED
    forward = public_forward(hf.PegasusForCausalLM.forward)(CausalLMHead.forward)
