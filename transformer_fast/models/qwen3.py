"""Qwen3 (Yang et al., 2025), every head: Llama's layers with a norm of each head's queries and keys."""

from transformers.models.qwen3 import modeling_qwen3 as hf

from ._decoder import LLAMA_SLOTS, LlamaRMSNorm
from ._decoder_classes import classes_of

_SLOTS = LLAMA_SLOTS | {"query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"}

globals().update(classes_of(hf, "Qwen3", __name__, _SLOTS, norm=LlamaRMSNorm))
