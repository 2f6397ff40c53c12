"""Which modules of a model become Int8Linear, and why the others do not."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..backends.contents import FileMappings
from ..backends.memory import unload
from .projection import is_plain, is_transposed
from .quantized import Int8Linear

__all__ = ["Quantized", "quantized_modules", "replace"]

_FEW = 64  # outputs: the last layer of a classifier costs nothing, and decides


def replace(model: nn.Module, skip: Iterable[str], group: int, *, empty: bool = False) -> None:
    """Put Int8Linear in the place of the linear layers; empty: without values, for a checkpoint to fill."""
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
        if empty:
            out, inner = weight.shape
            made[module] = Int8Linear(inner, out, bias is not None, group, weight.device, weight.dtype)
            continue
        try:
            made[module] = Int8Linear.of(weight, bias, group)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        unload(module.weight.detach(), files)  # else a checkpoint's pages stay as long as any of its tensors
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child in made:
                parent._modules[key] = made[child]
    model.eval()
    model.requires_grad_(False)


def _is_linear(module: Any) -> bool:
    return is_plain(module, nn.Linear) or is_transposed(module)


def _why_not(name: str, module: Any, skip: tuple[str, ...]) -> str | None:
    """Why a module with a linear layer's weight stays as it is; None where it does not."""
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
    """{name of a linear module: "int8", or why it is not}."""

    @property
    def left(self) -> dict[str, str]:
        """The linear modules that are not in int8."""
        return {name: why for name, why in self.items() if why != "int8"}


def quantized_modules(model: nn.Module) -> Quantized:
    """Every module of a model with a matrix for its weight but embeddings, and "int8" or why it is not.

    Args:
        model: any torch.nn.Module.

    Returns:
        A dict by module name, which prints in groups.

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
