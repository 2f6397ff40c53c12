"""OPT (Zhang et al., 2022), every head: learned positions that count the tokens the mask keeps, norms before or after
the sublayers, embeddings that may be narrower than the layers."""

from typing import Any

import torch
import torch.nn.functional as F
from transformers.models.opt import modeling_opt as hf

from ..layers import TransformerSpec, Unpadding, documents_of
from ..layers.embeddings import check_indices
from ..layers.projection import linear
from ._base import Adopted, ModelMixin, activation_name
from ._decoder import DecoderBase, Heads, LearnedPositions
from ._decoder_classes import classes_of
from ._forward import public_forward
from ._layer import kept_layers
from ._run_stack import Inputs

_SLOTS = {
    "attention_norm": "self_attn_layer_norm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "attention_dropout": "self_attn.dropout",
    "attention_output": "self_attn.out_proj",
    "attention_output_dropout": "dropout",
    "output_norm": "final_layer_norm",
    "up": "fc1",
    "activation_fn": "activation_fn",
    "down": "fc2",
    "output_dropout": "dropout",
}
_ADOPTED = Adopted()


class _Decoder(LearnedPositions, DecoderBase):
    embed_positions: Any
    final_layer_norm: Any
    project_in: Any
    project_out: Any

    def spec(self) -> TransformerSpec:
        config = self.config
        return TransformerSpec(
            config.num_attention_heads, config.hidden_size // config.num_attention_heads, causal=True,
            norm_position="pre" if config.do_layer_norm_before else "post",
            activation=activation_name(config.activation_function),
        )  # fmt: skip

    def _layers(self):
        return self.layers

    def _called_layers(self):
        return kept_layers(self, self.layers)

    def _final_norm(self) -> Any:
        return self.final_layer_norm

    def _position_table(self) -> Any:
        return self.embed_positions

    def _positions(self, inputs: Inputs, past) -> torch.Tensor:
        """(B or 1, S): rows of the table. Positions start at row `offset`; padding has the row before."""
        positions, mask, source = inputs.position_ids, inputs.attention_mask, inputs.source()
        if positions is None and mask is not None:
            if mask.dim() != 2:
                raise ValueError(
                    f"position_ids: wanted with an attention_mask of {mask.dim()} dimensions, got None; they are "
                    "counted only from a mask (batch, length)"
                )
            positions = (mask.cumsum(1) * mask - 1).long()[:, past:]
        elif positions is None:
            positions = torch.arange(source.shape[1], device=source.device)[None] + past
        rows = positions + self.embed_positions.offset
        check_indices("position_ids", rows, self.embed_positions.num_embeddings, "config.max_position_embeddings + 2")
        return rows

    def _documents(self, inputs: Inputs, shape: tuple[int, int], kwargs: dict) -> torch.Tensor | None:
        return documents_of(shape, None, kwargs)

    def _embed(self, unpadding: Unpadding, inputs: Inputs, positions: torch.Tensor | None, past) -> torch.Tensor:
        rows = DecoderBase._embed(self, unpadding, inputs, None, past)
        if self.project_in is not None:
            rows = linear(self.project_in, rows)
        places: Any = positions
        return rows + F.embedding(unpadding.unpad(places.expand(unpadding.batch, -1)), self.embed_positions.weight)

    def _close(self, rows: torch.Tensor) -> torch.Tensor:
        rows = super()._close(rows)
        return rows if self.project_out is None else linear(self.project_out, rows)

    def _step_positions(self) -> dict[str, Any]:
        refused = "" if self.project_in is None else "its embeddings are narrower than its layers"
        return super()._step_positions() | {"position_offset": self.embed_positions.offset, "refused": refused}


@_ADOPTED.register
class OPTModel(ModelMixin, hf.OPTModel):
    __doc__ = hf.OPTModel.__doc__
    _adopted = _ADOPTED

    @public_forward(hf.OPTModel.forward)
    def forward(self, input_ids: torch.Tensor | None = None, past_key_values=None, **kwargs):
        return self.decoder(input_ids=input_ids, past_key_values=past_key_values, **kwargs)


class _Heads(Heads):
    model: Any

    def _body(self) -> Any:
        return self.model.decoder


globals().update(classes_of(hf, "OPT", __name__, _SLOTS, base=_Decoder, body="Decoder", heads=_Heads, adopted=_ADOPTED))
