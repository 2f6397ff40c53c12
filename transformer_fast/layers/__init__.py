"""Layers: what a transformer computes, driven by a TransformerSpec and modules by role. They never name a backend."""

from .attention import MultiheadAttention
from .encoder import Rotary, StackCall, encoder_layer, plan_call, run_layers
from .packing import Packing, compute_padding, documents_of, plan_packing
from .spec import LayerWeights, SlotTable, TransformerSpec

__all__ = [
    "LayerWeights",
    "MultiheadAttention",
    "Packing",
    "Rotary",
    "SlotTable",
    "StackCall",
    "TransformerSpec",
    "compute_padding",
    "documents_of",
    "encoder_layer",
    "plan_call",
    "plan_packing",
    "run_layers",
]
