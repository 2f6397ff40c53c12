"""What of a model runs fast, what does not, and why."""

from typing import Any

from torch import nn

from ..layers.stock import is_sharded
from ._stock import why_hf_forward, why_hf_loop

__all__ = ["explain_model"]


def explain_model(model: nn.Module, kind: Any) -> str:
    """One line for each part of class `kind` (a base, an encoder, a decoder: the model first), and one for generate."""
    lines = [type(model).__name__]
    sharded = is_sharded(model)  # its forward, which comes first, has what is not sharded with a layer gathered
    for path, module in model.named_modules():
        if isinstance(module, kind):
            reason = why_hf_forward(module, sharded)
            what = f"transformers' own forward, as {reason}" if reason else "the fast path"
            lines.append(f"  {path or 'forward'}: {what}")
    if hasattr(model, "generate") and getattr(model, "can_generate", lambda: True)():
        reason = why_hf_loop(model)
        what = f"transformers' own loop, as {reason}" if reason else "this package's engine"
        lines.append(f"  generate: {what}")
    return "\n".join(lines)
