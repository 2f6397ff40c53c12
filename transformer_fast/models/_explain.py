"""The text of explain(): which parts of a model run fast, and why the others do not."""

from typing import Any

from torch import nn

from ..backends import without_kernels
from ..layers.quantizing import describe
from ..layers.stock import is_sharded
from ._stock import READ_WHOLE, why_hf_forward, why_hf_loop

__all__ = ["explain_model"]


def explain_model(model: nn.Module, kind: Any) -> str:
    """One line per part of class `kind` (the model first, then its base, encoder, decoder), and one for generate."""
    lines = [type(model).__name__]
    sharded = is_sharded(model)  # FSDP2 gathers what is not sharded with a layer before the model's own forward
    for path, module in model.named_modules():
        if isinstance(module, kind):
            reason = why_hf_forward(module, sharded)
            what = f"transformers' own forward, as {reason}" if reason else "the fast path"
            what += ", padding too, which the model around it may read" if READ_WHOLE in module.__dict__ else ""
            lines.append(f"  {path or 'forward'}: {what}")
    if hasattr(model, "generate") and getattr(model, "can_generate", lambda: True)():
        reason = why_hf_loop(model)
        what = f"transformers' own loop, as {reason}" if reason else "this package's engine"
        lines.append(f"  generate: {what}")
    return "\n".join([*lines, *filter(None, [describe(model), without_kernels(model)])])
