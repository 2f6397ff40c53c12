"""Marian's translation models (Junczys-Dowmunt et al., 2018), every head: HF's parameters, our computation."""

from typing import Any

import torch
from transformers.models.marian import modeling_marian as hf

from ..generation import GenerationMixin
from ..layers import Packing
from ..layers.embeddings import embed
from ._bart import BartCausalLM, BartDecoderBase, BartEncoderBase, BartLayer, BartLMHead, BartSeq2Seq
from ._base import Adopted
from ._forward import public_forward
from ._layer import AttentionModule

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


class _Embeddings:
    """scale * word + sinusoidal position: both stacks of Marian begin so."""

    embed_tokens: Any
    embed_positions: Any
    embed_scale: float
    dropout: float
    training: bool

    def _embed(self, packing: Packing, input_ids, inputs_embeds, past) -> torch.Tensor:
        return embed(
            packing, self._words, self._positions, None, None, self.dropout if self.training else 0.0,
            input_ids=input_ids, inputs_embeds=inputs_embeds, position_ids=None, segment_ids=None, past=past,
        )  # fmt: skip

    def _step_parts(self) -> dict[str, Any]:
        return {"position": self.embed_positions, "embed_scale": self.embed_scale}

    def _words(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(ids) * self.embed_scale

    def _positions(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embed_positions(None, position_ids=ids)

    def _most_positions(self) -> int:
        return self.embed_positions.num_embeddings


@_ADOPTED.register
class MarianEncoder(_Embeddings, BartEncoderBase, hf.MarianEncoder):
    _adopted = _ADOPTED
    forward = public_forward(hf.MarianEncoder.forward)(BartEncoderBase.forward)


@_ADOPTED.register
class MarianDecoder(_Embeddings, BartDecoderBase, hf.MarianDecoder):
    _adopted = _ADOPTED
    forward = public_forward(hf.MarianDecoder.forward)(BartDecoderBase.forward)

    def _embed(self, packing: Packing, input_ids, inputs_embeds, past) -> torch.Tensor:
        if inputs_embeds is not None:  # scaled here, unlike the encoder's
            inputs_embeds = inputs_embeds * self.embed_scale
        return super()._embed(packing, input_ids, inputs_embeds, past)


@_ADOPTED.register
class MarianModel(BartSeq2Seq, hf.MarianModel):
    __doc__ = hf.MarianModel.__doc__
    _adopted = _ADOPTED
    forward = public_forward(hf.MarianModel.forward)(BartSeq2Seq.forward)


class MarianMTModel(GenerationMixin, BartLMHead, hf.MarianMTModel):
    __doc__ = hf.MarianMTModel.__doc__
    _adopted = _ADOPTED
    forward = public_forward(hf.MarianMTModel.forward)(BartLMHead.forward)


class MarianForCausalLM(GenerationMixin, BartCausalLM, hf.MarianForCausalLM):
    __doc__ = hf.MarianForCausalLM.__doc__
    _adopted = _ADOPTED
    forward = public_forward(hf.MarianForCausalLM.forward)(BartCausalLM.forward)
