"""Mistral (Jiang et al., 2023), every head: Llama's layers with a window over the last keys."""

from transformers.models.mistral import modeling_mistral as hf

from ._decoder import LLAMA_SLOTS, LlamaRMSNorm
from ._decoder_classes import classes_of

globals().update(classes_of(hf, "Mistral", __name__, LLAMA_SLOTS, norm=LlamaRMSNorm))
