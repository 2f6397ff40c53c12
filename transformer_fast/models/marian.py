"""Marian's translation models (Junczys-Dowmunt et al., 2018), every head: HF's parameters, our computation."""

from transformers.models.marian import modeling_marian as hf

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

__all__ = ["MarianForCausalLM", "MarianMTModel", "MarianModel"]

_ADOPTED = Adopted()


@_ADOPTED.register
class MarianEncoderLayer(BartLayer, hf.MarianEncoderLayer):
    pass


@_ADOPTED.register
class MarianDecoderLayer(BartLayer, hf.MarianDecoderLayer):
    pass


@_ADOPTED.register
class MarianAttention(AttentionModule, hf.MarianAttention):
    pass


@_ADOPTED.register
class MarianEncoder(SinusoidalPositions, BartEncoderBase, hf.MarianEncoder):
    _adopted = _ADOPTED
    forward = public_forward(hf.MarianEncoder.forward)(BartEncoderBase.forward)


@_ADOPTED.register
class MarianDecoder(ScalesGivenEmbeddings, BartDecoderBase, hf.MarianDecoder):
    _adopted = _ADOPTED
    forward = public_forward(hf.MarianDecoder.forward)(BartDecoderBase.forward)


@_ADOPTED.register
class MarianModel(Seq2SeqModel, hf.MarianModel):
    __doc__ = hf.MarianModel.__doc__
    _adopted = _ADOPTED
    forward = public_forward(hf.MarianModel.forward)(Seq2SeqModel.forward)


class MarianMTModel(GenerationMixin, LMHead, hf.MarianMTModel):
    __doc__ = hf.MarianMTModel.__doc__
    _adopted = _ADOPTED
    forward = public_forward(hf.MarianMTModel.forward)(LMHead.forward)


class MarianForCausalLM(GenerationMixin, CausalLMHead, hf.MarianForCausalLM):
    __doc__ = hf.MarianForCausalLM.__doc__
    _adopted = _ADOPTED
    forward = public_forward(hf.MarianForCausalLM.forward)(CausalLMHead.forward)
