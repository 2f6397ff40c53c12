"""explain: which backend computes an op's call, or which parts of a model run on this package, and why not the
others."""

from typing import Any

from torch import nn

from .. import backends
from ..layers.quantizing import describe
from . import swaps
from .huggingface import NAME

__all__ = ["explain"]


def explain(what: Any) -> str:
    """Say what runs fast, what does not, and why.

    Args:
        what: a backends.Call (op, device, dtype, size, features): says which backend runs it, why each earlier one does
            not, and why a forced one cannot. Or a model, or an object with one as its attribute `model` (a pipeline):
            for a model of this package, says which parts use the fast path and why the others run transformers' own
            forward or loop; for any other, what `accelerate` swapped.

    Returns:
        Lines of text.

    Raises:
        ValueError: for an unknown op.
        TypeError: for neither a Call nor a model.

    Examples:
        >>> import transformer_fast
        >>> from transformer_fast.demo import locate
        >>> text = transformer_fast.explain(transformer_fast.AutoModel.from_pretrained(locate()))
    """
    held = getattr(what, "model", None)
    if not isinstance(what, nn.Module) and isinstance(held, nn.Module):
        return explain(held)
    if not isinstance(what, nn.Module):
        return backends.explain(what)
    own = getattr(what, "explain", None)
    if callable(own) and hasattr(what, "why_hf_loop"):
        return own()
    if any(cls.__module__.startswith("transformer_fast.models.") for cls in type(what).__mro__):
        return _explain_own(what)
    parts = [(path, m) for path, m in what.named_modules() if path and hasattr(m, "why_hf_loop")]
    if parts:  # wrapped: PEFT, DDP
        outermost = [(path, m) for path, m in parts if not any(path.startswith(f"{other}.") for other, _ in parts)]
        return "\n".join([type(what).__name__, *(f"{path}: {m.explain()}" for path, m in outermost)])
    swapped = [(path, m) for path, m in what.named_modules() if isinstance(m, swaps.Swapped)]
    attends = getattr(getattr(what, "config", None), "_attn_implementation", None) == NAME and _asks(what)
    lines = [f"{type(what).__name__}: not a model of this package; accelerate(model) swaps what can be swapped"]
    lines.append(f"  attention: {'ours' if attends else 'its own'}")
    lines += [f"  {path}: {m._kind}" for path, m in swapped]
    return "\n".join([*lines, *filter(None, [describe(what)])])


def _explain_own(model: Any) -> str:
    """For a model without an HF class."""
    lines = [type(model).__name__, "  forward: the fast path, which is the only one"]
    if hasattr(model, "why_hf_loop"):
        reason = model.why_hf_loop()
        what = f"transformers' own loop, as {reason}" if reason else "this package's engine"
        lines.append(f"  generate: {what}")
    return "\n".join([*lines, *filter(None, [describe(model), backends.without_kernels(model)])])


def _asks(model: Any) -> bool:
    from .._transformers import takes_attention

    return takes_attention(model)
