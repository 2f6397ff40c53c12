"""Llama (Touvron et al., 2023), every head: HF's parameters and names, our computation."""

from transformers.models.llama import modeling_llama as hf

from ._decoder import LLAMA_SLOTS, LlamaRMSNorm
from ._decoder_classes import classes_of

globals().update(classes_of(hf, "Llama", __name__, LLAMA_SLOTS, norm=LlamaRMSNorm))
