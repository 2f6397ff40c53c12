"""M2M100 and NLLB-200 (Fan et al., 2020; NLLB team, 2022), every head: HF's parameters and names, our computation."""

from typing import Any

import torch
from torch.nn import functional as F
from transformers.models.m2m_100 import modeling_m2m_100 as hf

from ..generation import GenerationMixin
from ..layers import Unpadding
from ..layers.embeddings import embed
from ._bart import BartDecoderBase, BartEncoderBase, BartLayer
from ._base import Adopted
from ._forward import public_forward
from ._layer import AttentionModule
from ._run_stack import Inputs
from ._seq2seq import Seq2SeqModel
from ._seq2seq_heads import LMHead

__all__ = ["M2M100ForConditionalGeneration", "M2M100Model"]

_ADOPTED = Adopted()


@_ADOPTED.register
class M2M100EncoderLayer(BartLayer, hf.M2M100EncoderLayer):
    pass


@_ADOPTED.register
class M2M100DecoderLayer(BartLayer, hf.M2M100DecoderLayer):
    pass


@_ADOPTED.register
class M2M100Attention(AttentionModule, hf.M2M100Attention):
    pass


@_ADOPTED.register
class M2M100SinusoidalPositionalEmbedding(hf.M2M100SinusoidalPositionalEmbedding):
    @property
    def weight(self) -> torch.Tensor:
        """The table (positions, E), under the name that nn.Embedding uses."""
        return self.weights

    def cover(self, rows: int) -> None:
        """Extend the table to at least `rows` rows."""
        if rows > self.weights.shape[0]:
            self.make_weights(rows + self.offset, self.embedding_dim, self.padding_idx)


class _Embeddings:
    """Mixin for both stacks: embeddings are scale * word + sinusoidal position. Padding is found by its token id, not
    by
    the mask: it has its own row in the table, and positions count the other tokens of a call."""

    embed_tokens: Any
    embed_positions: Any
    dropout: float
    training: bool

    def _positions(self, inputs: Inputs, past) -> torch.Tensor:
        table, padding, length = self.embed_positions, self.embed_positions.padding_idx, inputs.source().shape[1]
        if isinstance(past, int) or not torch.compiler.is_compiling():
            table.cover(int(past) + length + padding + 1)
        if inputs.input_ids is None:
            return torch.arange(1, length + 1, device=inputs.source().device)[None] + past + padding
        seen = inputs.input_ids != padding
        return (seen.cumsum(1) + past) * seen + padding

    def _embed(self, unpadding: Unpadding, inputs: Inputs, positions: torch.Tensor | None, past) -> torch.Tensor:
        return embed(
            unpadding, self.embed_tokens, self._embed_positions, None, None, self.dropout if self.training else 0.0,
            input_ids=inputs.input_ids, inputs_embeds=inputs.inputs_embeds, position_ids=positions, segment_ids=None,
        )  # fmt: skip

    def _step_parts(self) -> dict[str, Any]:
        padding = self.embed_positions.padding_idx
        return super()._step_parts() | {  # type: ignore[misc]
            "position_offset": padding + 1,
            "position_padding": padding,
            "embed_scale": self.embed_tokens.embed_scale,
        }

    def _embed_positions(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.embed_positions.weights)


@_ADOPTED.register
class M2M100Encoder(_Embeddings, BartEncoderBase, hf.M2M100Encoder):
    _adopted = _ADOPTED
    _pre_norm = True
    forward = public_forward(hf.M2M100Encoder.forward)(BartEncoderBase.forward)


@_ADOPTED.register
class M2M100Decoder(_Embeddings, BartDecoderBase, hf.M2M100Decoder):
    _adopted = _ADOPTED
    _pre_norm = True
    forward = public_forward(hf.M2M100Decoder.forward)(BartDecoderBase.forward)


@_ADOPTED.register
class M2M100Model(Seq2SeqModel, hf.M2M100Model):
    __doc__ = hf.M2M100Model.__doc__
    _adopted = _ADOPTED
    forward = public_forward(hf.M2M100Model.forward)(Seq2SeqModel.forward)


class M2M100ForConditionalGeneration(GenerationMixin, LMHead, hf.M2M100ForConditionalGeneration):
    __doc__ = hf.M2M100ForConditionalGeneration.__doc__
    _adopted = _ADOPTED
    forward = public_forward(hf.M2M100ForConditionalGeneration.forward)(LMHead.forward)
    final_logits_bias = None
    _caches_beside_labels = True
