"""Replaces the linear modules of a model by Int8Linear, and says why others are not replaced."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..backends.contents import FileMappings
from ..backends.memory import unload
from ..ops.linear_int8 import group_of
from .projection import is_plain, is_transposed
from .quantized import Int8Linear

__all__ = ["Quantized", "quantized_modules", "replace"]

_FEW = 64  # layers with fewer outputs stay: a classifier's last layer costs nothing, and its accuracy matters most


def replace(model: nn.Module, skip: Iterable[str], group: int, *, empty: bool = False) -> None:
    """Replace the linear layers of a model by Int8Linear in place. skip: names of modules to leave. group: inputs per
    scale, at most (see group_of). empty: make them without values, for a checkpoint that is loaded later."""
    skip = tuple(skip)
    names = {name for name, _ in model.named_modules()}
    unknown = [name for name in skip if name not in names]
    if unknown:
        raise ValueError(f"skip: {', '.join(map(repr, unknown))}: no such module in {type(model).__name__}")
    made: dict[nn.Module, Int8Linear] = {}
    files = FileMappings()
    for name, module in list(model.named_modules()):
        if _why_not(name, module, skip) is not None or not _is_linear(module):
            continue
        weight: Any = module.weight.t() if is_transposed(module) else module.weight
        bias: Any = module.bias
        out, inner = weight.shape
        chosen = group_of(inner, group)
        if empty:
            made[module] = Int8Linear(inner, out, bias is not None, chosen, weight.device, weight.dtype)
            continue
        try:
            made[module] = Int8Linear.of(weight, bias, chosen)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        unload(module.weight.detach(), files)  # a mapped checkpoint would otherwise keep these pages in memory
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child in made:
                parent._modules[key] = made[child]
    model.eval()
    model.requires_grad_(False)


def _is_linear(module: Any) -> bool:
    return is_plain(module, nn.Linear) or is_transposed(module)


def _why_not(name: str, module: Any, skip: tuple[str, ...]) -> str | None:
    """Why a module with a matrix weight is not quantised; None if it is."""
    if any(name == s or name.startswith(f"{s}.") for s in skip):
        return "it is in skip"
    if not _is_linear(module):
        return f"it is a {type(module).__name__}, not a plain linear layer"
    weight = module.weight
    if type(weight) is not nn.Parameter or not weight.is_floating_point():
        return f"its weight is a {type(weight).__name__} of {weight.dtype}"
    if "pooler" in name.split("."):
        return "it reads one position of each sequence"
    out = weight.shape[1] if is_transposed(module) else weight.shape[0]
    if out < _FEW:
        return f"it has {out} outputs, under {_FEW}"
    return None


class Quantized(dict[str, str]):
    """A dict from the name of a linear module to "int8" or the reason why it is not in int8."""

    @property
    def left(self) -> dict[str, str]:
        """The linear modules that are not in int8."""
        return {name: why for name, why in self.items() if why != "int8"}


def quantized_modules(model: nn.Module) -> Quantized:
    """List the modules of a model that have a weight matrix, without embeddings, and say which are in int8.

    Args:
        model: any torch.nn.Module.

    Returns:
        A Quantized: a dict from the name of each module to "int8" or the reason why it is not in int8. Its property
        `left` has only those that are not.

    Examples:
        >>> import torch, transformer_fast
        >>> transformer_fast.quantized_modules(torch.nn.Sequential(torch.nn.Linear(64, 64)))["0"]
        'the model has not been quantised'
    """
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    skip = tuple(getattr(config, "skip", ()) or ())
    found = Quantized()
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if isinstance(module, Int8Linear):
            found[name] = "int8"
        elif weight is not None and weight.dim() == 2 and not isinstance(module, nn.Embedding):
            found[name] = _why_not(name, module, skip) or "the model has not been quantised"
    return found
