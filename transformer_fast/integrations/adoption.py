"""Hugging Face's models made this package's in place: the same parameters and names, our forward and generation.

Whatever holds them (sentence-transformers, PEFT, a pipeline, a Trainer, modules of a user's own) keeps its reference: a
module's class changes, nothing else. Going back is setting the classes back.
"""

import copy
import importlib
from typing import Any

import torch
from torch import nn

from ..layers import stock
from ..models._base import ModelMixin
from ..models._layer import CONFIG
from ..models.registry import FAMILIES

__all__ = ["adopt", "class_for", "release"]

_FORMER = "_class_before"


def class_for(kind: type) -> Any:
    """This package's class for exactly Hugging Face's class `kind`, or None where there is none."""
    package, _, rest = kind.__module__.partition("transformers.models.")
    if package or not rest:
        return None
    folder = rest.partition(".")[0]
    for model_type, module in FAMILIES.items():
        if folder in (model_type.replace("-", "_"), model_type.partition("-")[0]):
            ours = getattr(importlib.import_module(f"..models.{module}", __package__), kind.__name__, None)
            return ours if isinstance(ours, type) and issubclass(ours, kind) and issubclass(ours, nn.Module) else None
    return None


def adopt(model: nn.Module) -> tuple[dict[str, type], dict[str, str]]:
    """Every outermost model of Hugging Face in the tree of `model` that there is a class for becomes ours.

    Returns {path: our class} of those that did, and {path: reason} of those that could not: the ones that are not what
    their constructor makes (subclasses, hooks, replaced modules, wrappers that rows without padding cannot go through).
    """
    adopted, left, inside = {}, {}, set()
    module: Any
    for path, module in list(model.named_modules()):
        if id(module) in inside:
            continue
        if isinstance(module, ModelMixin):
            inside |= {id(m) for m in module.modules()}  # type: ignore[attr-defined]
            continue
        ours = class_for(type(module))
        if ours is None:
            base = next((class_for(cls) for cls in type(module).__mro__ if class_for(cls)), None)
            if base is not None:
                inside |= {id(m) for m in module.modules()}
                left[path] = f"{type(module).__name__} is a subclass with code of its own of a class that is known"
            continue
        inside |= {id(m) for m in module.modules()}
        reason = _adopt(module, ours)
        if reason:
            left[path] = reason
        else:
            adopted[path] = ours
    return adopted, left


def _adopt(module: Any, ours: Any) -> str:
    """'' when `module` is of class `ours` now, else why it is not."""
    if hooks := stock.hooks_on(module):
        return f"it has {hooks}"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    former = {m: type(m) for m in module.modules()}
    fresh = _as_constructed(module, ours)
    module.__class__ = ours
    ours._adopted.adopt(module)
    reason = stock.why_unlike(module, fresh)
    if reason:
        for m, kind in former.items():
            m.__class__ = kind
            m.__dict__.pop(CONFIG, None)
        return reason
    for m, kind in former.items():
        if type(m) is not kind:
            m.__dict__[_FORMER] = kind
    part: Any
    for path, part in module.named_modules():
        if isinstance(part, ModelMixin):
            stock.remember(part, fresh.get_submodule(path))  # type: ignore[arg-type]
    return ""


def _as_constructed(module: Any, ours: Any) -> nn.Module:
    """What ours would be made as with the module's configuration; without memory for its weights."""
    with torch.device("meta"):
        fresh = ours(copy.deepcopy(module.config))
    for path, part in fresh.named_modules():
        if "pooler" in part._modules and getattr(module.get_submodule(path), "pooler", part) is None:
            part.pooler = None  # add_pooling_layer=False, which no configuration tells
    return fresh


def release(model: nn.Module) -> None:
    """Undo `adopt`: every module is of the class that it was."""
    for module in model.modules():
        former = module.__dict__.pop(_FORMER, None)
        if former is not None:
            module.__class__ = former
            module.__dict__.pop(CONFIG, None)
            stock.forget(module)
