"""Qwen2 (Yang et al., 2024), every head: Llama's layers with biases on queries, keys and values."""

from transformers.models.qwen2 import modeling_qwen2 as hf

from ._decoder import LLAMA_SLOTS, LlamaRMSNorm
from ._decoder_classes import classes_of

globals().update(classes_of(hf, "Qwen2", __name__, LLAMA_SLOTS, norm=LlamaRMSNorm))
