"""Layers: what a transformer computes, driven by a TransformerSpec and modules by role. They never name a backend."""

from .attention import MultiheadAttention
from .disentangled import Disentangled
from .packing import Packing, compute_padding, documents_of, padding_is_computed, plan_packing, positions_kept
from .planning import Rotary, StackCall, plan_call
from .pooling import concat_pooling
from .sinusoids import SinusoidalPositions, sinusoids
from .spec import LayerWeights, SlotTable, TransformerSpec
from .stack import normed_input, run_layers, transformer_layer
from .taught_attention import AdditiveAttention, DotProductAttention, MultiHeadAttention

__all__ = [
    "AdditiveAttention",
    "Disentangled",
    "DotProductAttention",
    "LayerWeights",
    "MultiHeadAttention",
    "MultiheadAttention",
    "Packing",
    "Rotary",
    "SinusoidalPositions",
    "SlotTable",
    "StackCall",
    "TransformerSpec",
    "compute_padding",
    "concat_pooling",
    "documents_of",
    "normed_input",
    "transformer_layer",
    "padding_is_computed",
    "plan_call",
    "plan_packing",
    "positions_kept",
    "run_layers",
    "sinusoids",
]
