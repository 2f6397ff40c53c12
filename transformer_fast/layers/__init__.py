"""The computation of transformer layers, driven by a TransformerSpec and by modules with roles (LayerWeights). Layers
never name a backend."""

from .attention import MultiheadAttention
from .disentangled import Disentangled
from .planning import BeyondFastPath, Rotary, StackCall, plan_call
from .pooling import concat_pooling
from .sinusoids import SinusoidalPositions, sinusoids
from .spec import LayerWeights, SlotTable, TransformerSpec
from .stack import normed_input, run_layers, transformer_layer
from .taught_attention import AdditiveAttention, DotProductAttention, MultiHeadAttention
from .unpadding import Unpadding, compute_padding, documents_of, padding_is_computed, plan_unpadding, positions_kept

__all__ = [
    "AdditiveAttention",
    "Disentangled",
    "DotProductAttention",
    "LayerWeights",
    "MultiHeadAttention",
    "MultiheadAttention",
    "Unpadding",
    "Rotary",
    "SinusoidalPositions",
    "SlotTable",
    "BeyondFastPath",
    "StackCall",
    "TransformerSpec",
    "compute_padding",
    "concat_pooling",
    "documents_of",
    "normed_input",
    "transformer_layer",
    "padding_is_computed",
    "plan_call",
    "plan_unpadding",
    "positions_kept",
    "run_layers",
    "sinusoids",
]
