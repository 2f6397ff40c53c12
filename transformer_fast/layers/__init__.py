"""Layers: what a transformer computes, driven by a TransformerSpec and modules by role. They never name a backend."""

from .attention import MultiheadAttention
from .encoder import Rotary, StackCall, encoder_layer, plan_call, run_layers
from .packing import Packing, compute_padding, documents_of, plan_packing
from .pooling import concat_pooling
from .sinusoids import SinusoidalPositions, sinusoids
from .spec import LayerWeights, SlotTable, TransformerSpec
from .taught_attention import AdditiveAttention, DotProductAttention, MultiHeadAttention

__all__ = [
    "AdditiveAttention",
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
    "encoder_layer",
    "plan_call",
    "plan_packing",
    "run_layers",
    "sinusoids",
]
