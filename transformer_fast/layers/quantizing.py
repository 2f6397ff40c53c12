"""Replaces the linear modules of a model by Int8Linear, and says why others are not replaced."""

import fnmatch
import functools
import inspect
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

from ..backends.contents import FileMappings
from ..backends.memory import unload
from ..ops.linear_int8 import GROUPS, group_of
from .projection import is_linear_class, is_plain, is_transposed
from .quantized import Int8Linear

__all__ = [
    "Quantized",
    "check_group",
    "describe",
    "find_modules",
    "is_int8_model",
    "module_names",
    "quantized_modules",
    "replace",
    "replace_empty",
    "swap",
]

NEED_GRADIENTS = "_before_int8_required_gradients"  # attribute of a quantised model: names of parameters
_FEW = 64  # layers with fewer outputs stay: a classifier's last layer costs nothing, and its accuracy matters most


def module_names(skip: Iterable[str] | None) -> tuple[str, ...]:
    """The argument `skip` as a tuple of names. Raises TypeError for a string, or for names that are not strings."""
    if isinstance(skip, str) or not isinstance(skip, Iterable | None):
        raise TypeError(f"skip: wanted a list of names of modules, got {skip!r}")
    names = tuple(skip or ())
    if odd := [name for name in names if not isinstance(name, str)]:
        raise TypeError(f"skip: wanted names of modules, got {odd[0]!r}")
    return names


def find_modules(model: nn.Module, skip: Iterable[str]) -> tuple[str, ...]:
    """`skip` with the names that its wildcards match in place of them. Raises ValueError for what names no module."""
    names = [name for name, _ in model.named_modules() if name]
    found: dict[str, None] = {}
    for wanted in skip:
        matching = [wanted] if wanted in names else fnmatch.filter(names, wanted)
        if not matching:
            longer = [name for name in names if name.endswith(f".{wanted}")]
            hint = f"; there is {longer[0]!r}, which '*.{wanted}' matches" if longer else ""
            raise ValueError(f"skip: {wanted!r}: no such module in {type(model).__name__}{hint}")
        # Modules within those that are named already are left out.
        found |= {name: None for name in matching if not any(name.startswith(f"{other}.") for other in found)}
    return tuple(found)


def check_group(group: Any) -> None:
    if type(group) is not int or group not in GROUPS:
        raise ValueError(f"group: wanted one of {', '.join(map(str, GROUPS))}, got {group!r}")


def is_int8_model(model: nn.Module) -> bool:
    """True if any module is an Int8Linear."""
    return any(isinstance(module, Int8Linear) for module in model.modules())


def replace(model: nn.Module, skip: Collection[str], group: int) -> int:
    """Replace the linear layers of a model by Int8Linear in place. skip: names of modules to leave. group: inputs per
    scale, at most (see group_of). Returns the number of replaced layers."""
    made: dict[nn.Module, Int8Linear] = {}
    files, tree = FileMappings(), _Tree(model)
    for name, module in model.named_modules():
        if _why_not(name, module, skip, tree) is not None:
            continue
        if not name:
            raise ValueError(
                f"model: is itself a {type(model).__name__}, which cannot be replaced in place; quantise the module "
                "that contains it"
            )
        weight: Any = module.weight.t() if is_transposed(module) else module.weight
        if weight.is_meta:
            raise ValueError(f"{name}: its weight is on the meta device; load the weights before quantising")
        try:
            made[module] = Int8Linear.of(weight, module.bias, group_of(weight.shape[1], group))  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        unload(module.weight.detach(), files)  # type: ignore[operator]  # a mapped checkpoint would otherwise keep these pages in memory
    _put(model, made)
    return len(made)


def replace_empty(model: nn.Module, names: Collection[str] | None, group: int, skip: Collection[str] = ()) -> None:
    """Replace linear layers by Int8Linear without values, for a checkpoint that is loaded later. names: of the layers;
    None for those that `replace` would choose."""
    made: dict[nn.Module, Int8Linear] = {}
    tree = _Tree(model)
    for name, module in model.named_modules():
        if (_why_not(name, module, skip, tree) is not None) if names is None else name not in names:
            continue
        if not _is_linear(module):
            raise ValueError(f"{name}: is int8 in the checkpoint, but a {type(module).__name__} in the model")
        weight: Any = module.weight.t() if is_transposed(module) else module.weight
        out, inner = weight.shape
        biased, chosen = module.bias is not None, group_of(inner, group)
        made[module] = Int8Linear(inner, out, biased, chosen, weight.device, weight.dtype)
    _put(model, made)


def swap(model: nn.Module, made: Mapping[Any, nn.Module]) -> None:
    """Put made[module] in the place of each of these modules of a model."""
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child in made:
                parent._modules[key] = made[child]


def _put(model: nn.Module, made: dict[nn.Module, Int8Linear]) -> None:
    trained = frozenset(name for name, p in model.named_parameters() if p.requires_grad)
    swap(model, made)
    for module, int8 in made.items():
        int8.replaces = type(module)
    setattr(model, NEED_GRADIENTS, trained)
    model.eval()
    model.requires_grad_(False)


def _is_linear(module: Any) -> bool:
    return is_plain(module, nn.Linear) or is_transposed(module)


# ---- what is left alone ----------------------------------------------------------------------------
class _Tree:
    """What must be known of the modules around a linear layer.

    owners: for a module, its parents and its name in each. adapted: the names of PEFT's layers, with a dot.
    """

    def __init__(self, model: nn.Module):
        self.owners: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
        self.adapted: list[str] = []
        for name, module in model.named_modules():
            if hasattr(module, "base_layer") and type(module).__module__.startswith("peft."):
                self.adapted.append(f"{name}." if name else "")
            for key, child in module._modules.items():
                if child is not None:
                    self.owners.setdefault(child, []).append((module, key))


@functools.cache
def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # made at run time
        return ""


@functools.cache
def _reads_weight(owner: type, name: str) -> bool:
    """True if the code of class `owner` reads the weight of its child `name`, and does not expect one of int8."""
    own = (
        cls
        for cls in owner.__mro__
        if not cls.__module__.startswith(("torch.nn.modules.module", "transformers.modeling_utils"))
    )
    return any(
        re.search(rf"\bself\.{name}\.weight\b(?!\.data)", text) and "torch.int8" not in text
        for text in map(_source, own)
    )


def _why_not(name: str, module: Any, skip: Collection[str], tree: _Tree) -> str | None:
    """Why a module with a matrix weight is not quantised; None if it is."""
    if any(name == s or name.startswith(f"{s}.") for s in skip):
        return "it is in skip"
    kind = type(module)
    if not is_linear_class(kind):
        return f"it is a {kind.__name__}, not a plain linear layer"
    if not _is_linear(module):
        return "it has hooks, or a forward of its own"
    weight = module.weight
    if type(weight) is not nn.Parameter or not weight.is_floating_point():
        return f"its weight is a {type(weight).__name__} of {weight.dtype}"
    if any(name.startswith(layer) for layer in tree.adapted):
        return "it is part of an adapter's layer; merge the adapter to quantise it"
    for owner, key in tree.owners.get(module, ()):
        # The owners of this package take int8 layers.
        if not type(owner).__module__.startswith("transformer_fast.") and _reads_weight(type(owner), key):  # type: ignore[arg-type]
            return f"the code of {type(owner).__name__} reads its weight"
    if "pooler" in name.split("."):
        return "it reads one position of each sequence"
    out = weight.shape[1] if is_transposed(module) else weight.shape[0]
    if out < _FEW:
        return f"it has {out} outputs, under {_FEW}"
    return None if weight.numel() else "it has no inputs"


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

    Raises:
        TypeError: if the model is not a torch.nn.Module.

    Examples:
        >>> import torch, transformer_fast
        >>> transformer_fast.quantized_modules(torch.nn.Sequential(torch.nn.Linear(64, 64)))["0"]
        'the model has not been quantised'
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: wanted an nn.Module, got {type(model).__name__}")
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    skip = tuple(getattr(config, "skip", ()) or ())
    found, tree = Quantized(), _Tree(model)
    later = is_int8_model(model)
    other = "it came after the others were quantised" if later else "the model has not been quantised"
    for name, module in model.named_modules():
        if isinstance(module, Int8Linear):
            found[name] = "int8"
        elif _has_matrix(module):
            found[name] = _why_not(name, module, skip, tree) or other
    return found


def _has_matrix(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear):
        return True
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 2 and not isinstance(module, nn.Embedding)


def describe(model: nn.Module) -> str:
    """One line on what is in int8, for explain; "" if nothing is."""
    if not is_int8_model(model):
        return ""
    found = quantized_modules(model)
    left = found.left
    text = f"{len(found) - len(left)} of {len(found)} linear layers"
    some = [f"{name} ({why})" for name, why in list(left.items())[:4]]
    more = "" if len(left) <= len(some) else f", and {len(left) - len(some)} more: see quantized_modules"
    return f"  int8: {text}{'; not ' if some else ''}{', '.join(some)}{more}"
