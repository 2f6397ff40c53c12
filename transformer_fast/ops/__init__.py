"""The ops: schema, input checks, fake kernel, autograd and documentation, one file an op."""

from ._common import concrete
from .activation import bias_activation
from .attention import (
    RelativeBias,
    attention_probabilities,
    qkv_attention,
    scaled_dot_product_attention,
    varlen_attention,
)
from .dropout import dropout
from .linear import linear, pack_storage, pack_weight, packed_linear
from .multi_head_attention import multi_head_attention
from .norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm

__all__ = [
    "RelativeBias",
    "add_layer_norm",
    "add_rms_norm",
    "attention_probabilities",
    "bias_activation",
    "concrete",
    "dropout",
    "layer_norm",
    "linear",
    "multi_head_attention",
    "pack_storage",
    "pack_weight",
    "packed_linear",
    "qkv_attention",
    "rms_norm",
    "scaled_dot_product_attention",
    "varlen_attention",
]
