"""The ops: schema, input checks, fake kernel, autograd and documentation, one file per op."""

from . import _parallel as parallel
from ._common import concrete, exporting
from .activation import bias_activation
from .additive_attention import additive_attention
from .attention import RelativeBias, qkv_attention, scaled_dot_product_attention, varlen_attention
from .attention_probabilities import attention_probabilities
from .cross_entropy import cross_entropy
from .dropout import dropout
from .embedding import embedding_layer_norm
from .kv_cache_attention import kv_cache_attention
from .linear import linear, projections, to_panels
from .linear_cross_entropy import linear_cross_entropy
from .multi_head_attention import multi_head_attention
from .norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from .recurrence import gru, lstm
from .recurrent_step import recurrent_step
from .rotary import rotary_embedding
from .rotary_cache_append import rotary_cache_append
from .token_embedding import embedding

__all__ = [
    "RelativeBias",
    "add_layer_norm",
    "add_rms_norm",
    "additive_attention",
    "attention_probabilities",
    "bias_activation",
    "concrete",
    "cross_entropy",
    "dropout",
    "embedding",
    "embedding_layer_norm",
    "exporting",
    "gru",
    "kv_cache_attention",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "lstm",
    "multi_head_attention",
    "to_panels",
    "parallel",
    "projections",
    "qkv_attention",
    "recurrent_step",
    "rms_norm",
    "rotary_cache_append",
    "rotary_embedding",
    "scaled_dot_product_attention",
    "varlen_attention",
]
