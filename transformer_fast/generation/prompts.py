"""What steppers read from a prompt: whether they can run it, which columns rows attend to, the next positions."""

from typing import Any

import torch

from ..ops._common import autocast_dtype
from .stepper import Prompt

__all__ = ["encoder_mask", "encoder_states", "kept_columns", "kept_first", "last_positions", "why_not_prompt"]

_SERVED = {
    "attention_mask", "decoder_attention_mask", "position_ids", "encoder_outputs", "encoder_hidden_states",
    "encoder_attention_mask", "use_cache", "return_dict", "logits_to_keep", "cache_position",
}  # fmt: skip


def why_not_prompt(prompt: Prompt) -> str:
    """'' if a step other than the model's forward can decode this prompt in the current state, else the reason why
    not."""
    device = prompt.input_ids.device
    if torch.compiler.is_compiling():
        return "torch.compile is tracing"
    if torch.is_grad_enabled():
        return "gradients are enabled"
    if autocast_dtype(device) is not None:
        return "autocast is on"
    if not prompt.input_ids.numel():
        return f"the prompt has shape {tuple(prompt.input_ids.shape)}"
    odd = sorted(k for k, v in prompt.inputs.items() if v is not None and k not in _SERVED)
    if odd:
        return f"the prompt has {', '.join(odd)}"
    masks = [prompt.inputs.get(f"{of}attention_mask") for of in ("", "decoder_", "encoder_")]
    if any(m is not None and m.dim() != 2 for m in masks):
        return "the prompt has a mask that is not (batch, length)"
    return ""


def encoder_states(prompt: Prompt) -> torch.Tensor | None:
    """The encoder's states (B, Se, E) for cross-attention, or None."""
    outputs = prompt.inputs.get("encoder_outputs")
    if outputs is None:
        return prompt.inputs.get("encoder_hidden_states")
    return outputs[0] if isinstance(outputs, tuple) else outputs.last_hidden_state


def encoder_mask(prompt: Prompt) -> torch.Tensor | None:
    """(B, Se) bool, or None if all of the encoder's states are kept."""
    name = "attention_mask" if prompt.inputs.get("encoder_outputs") is not None else "encoder_attention_mask"
    mask: Any = prompt.inputs.get(name)
    return None if mask is None or bool((mask != 0).all()) else mask != 0


def kept_columns(prompt: Prompt) -> torch.Tensor:
    """(B, S) bool: the columns that rows attend to."""
    name = "attention_mask" if prompt.inputs.get("encoder_outputs") is None else "decoder_attention_mask"
    mask = prompt.inputs.get(name)
    if mask is None:
        return torch.ones_like(prompt.input_ids, dtype=torch.bool)
    if mask.shape != prompt.input_ids.shape:
        raise ValueError(f"{name}: wanted shape {tuple(prompt.input_ids.shape)}, got {tuple(mask.shape)}")
    return mask != 0


def kept_first(mask: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
    """An order (B, S) of the columns of each row with those that mask keeps first (None if all are kept), and the
    number of kept columns, int32 (B,)."""
    lengths = mask.sum(1, dtype=torch.int32)
    if bool(mask.all()):
        return None, lengths
    return mask.to(torch.int8).argsort(dim=1, descending=True, stable=True), lengths


def last_positions(prompt: Prompt) -> torch.Tensor:
    """(B,): the position of the token that follows each prompt."""
    batch, length = prompt.input_ids.shape
    given = prompt.inputs.get("position_ids")
    if given is None:
        return torch.full((batch,), length, device=prompt.input_ids.device)
    return given.expand(batch, -1)[:, -1] + 1
