"""Weights to and from torch.nn.Transformer: names, and projections that are one matrix there."""

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["export", "load", "settings_of"]

_NORMS = {
    "encoder": {"norm1": "self_attn_layer_norm", "norm2": "final_layer_norm"},
    "decoder": {"norm1": "self_attn_layer_norm", "norm2": "encoder_attn_layer_norm", "norm3": "final_layer_norm"},
}
_OTHERS = {"linear1": "fc1", "linear2": "fc2"}
_ATTENTIONS = {"self_attn": "self_attn", "multihead_attn": "encoder_attn"}


def settings_of(module: nn.Transformer) -> dict:
    """The fields of TransformerConfig that follow from a torch.nn.Transformer."""
    encoder, decoder = module.encoder, module.decoder
    first = encoder.layers[0]
    if first.linear1.bias is None:
        raise ValueError("module: wanted a torch.nn.Transformer with biases, got bias=False")
    activation = {F.relu: "relu", F.gelu: "gelu"}.get(first.activation)
    if activation is None:
        raise ValueError(f"module: wanted the activation relu or gelu, got {first.activation!r}")
    p = first.dropout.p
    return {
        "d_model": module.d_model, "num_attention_heads": module.nhead, "ffn_dim": first.linear1.out_features,
        "encoder_layers": len(encoder.layers), "decoder_layers": len(decoder.layers),
        "activation_function": activation, "norm_position": "pre" if first.norm_first else "post",
        "final_norm": encoder.norm is not None, "layer_norm_eps": first.norm1.eps,
        "dropout": p, "attention_dropout": p, "activation_dropout": p,
    }  # fmt: skip


def _pairs(model, module: nn.Transformer):
    """Yield (our parameters, torch's parameter), which is ours concatenated along the rows."""
    for side in ("encoder", "decoder"):
        ours, theirs = getattr(model, side), getattr(module, side)
        if len(ours.layers) != len(theirs.layers) or (ours.layer_norm is None) != (theirs.norm is None):
            raise ValueError(
                f"module: its {side} has {len(theirs.layers)} layers and {'no' if theirs.norm is None else 'a'} final "
                f"norm, wanted {len(ours.layers)} and {'no' if ours.layer_norm is None else 'a'} final norm"
            )
        both = [(ours.layer_norm, theirs.norm)] if theirs.norm is not None else []
        for mine, other in zip(ours.layers, theirs.layers):
            for there, here in {**_NORMS[side], **_OTHERS}.items():
                both.append((getattr(mine, here), getattr(other, there)))
            for there, here in _ATTENTIONS.items():
                attention = getattr(other, there, None)
                if attention is None:
                    continue
                slots = getattr(mine, here)
                both.append((slots.out_proj, attention.out_proj))
                projections = (slots.q_proj, slots.k_proj, slots.v_proj)
                yield [p.weight for p in projections], attention.in_proj_weight
                yield [p.bias for p in projections], attention.in_proj_bias
        for a, b in both:
            yield [a.weight], b.weight
            yield [a.bias], b.bias


@torch.no_grad()
def load(model, module: nn.Transformer) -> None:
    for ours, theirs in _pairs(model, module):
        rows = [p.shape[0] for p in ours]
        if theirs.shape != (sum(rows), *ours[0].shape[1:]):
            raise ValueError(
                f"module: a weight has shape {tuple(theirs.shape)}, wanted {(sum(rows), *ours[0].shape[1:])}"
            )
        for a, b in zip(ours, theirs.split(rows)):
            a.copy_(b)


@torch.no_grad()
def export(model) -> nn.Transformer:
    config = model.config
    if not config.final_norm:
        raise ValueError("config.final_norm: wanted True, as torch.nn.Transformer ends both stacks with a norm")
    if config.activation_function not in ("relu", "gelu"):
        raise ValueError(f"config.activation_function: torch has 'relu' and 'gelu', got {config.activation_function!r}")
    parameter = next(model.parameters())
    module = nn.Transformer(
        config.d_model, config.num_attention_heads, config.encoder_layers, config.decoder_layers, config.ffn_dim,
        config.dropout, config.activation_function, layer_norm_eps=config.layer_norm_eps, batch_first=True,
        norm_first=config.norm_position == "pre", device=parameter.device, dtype=parameter.dtype,
    )  # fmt: skip
    for ours, theirs in _pairs(model, module):
        theirs.copy_(torch.cat(ours) if len(ours) > 1 else ours[0])
    return module.train(model.training)
