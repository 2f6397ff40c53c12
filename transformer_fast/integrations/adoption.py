"""Gives Hugging Face's models this package's classes in place: the same parameters and names, our forward and
generation.

Only the classes of modules change, so references from elsewhere (sentence-transformers, PEFT, a pipeline, a Trainer, a
user's modules) stay valid. Setting the classes back undoes it.
"""

import copy
import importlib
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..layers import stock
from ..models._base import ModelMixin
from ..models._layer import CONFIG
from ..models._stock import BUILT, READ_WHOLE, remember_config
from ..models.registry import FAMILIES

__all__ = ["adopt", "class_for", "release"]

_FORMER = "_class_before"


def class_for(kind: type) -> Any:
    """This package's class for Hugging Face's class `kind` (not for its subclasses), or None."""
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
    """Give our class to every outermost Hugging Face model in the tree of `model` that we have a class for.

    Returns {path: our class} of the models changed, and {path: reason} of those left alone because they differ from
    what their constructor makes (subclasses, hooks, replaced modules, wrappers that cannot run on unpadded rows).
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
                left[path] = f"{type(module).__name__} is a user's subclass of a class that this package has"
            continue
        inside |= {id(m) for m in module.modules()}
        reason = _adopt(module, ours)
        if reason:
            left[path] = reason
        else:
            adopted[path] = ours
            if _is_read_whole(model, path):
                module.__dict__[READ_WHOLE] = True
    return adopted, left


def _is_read_whole(model: nn.Module, path: str) -> bool:
    """Whether a model of HF around the one at `path` may read its outputs at padding. Cross-attention does not."""
    names = path.split(".") if path else []
    for depth, name in enumerate(names):
        around = model.get_submodule(".".join(names[:depth]))
        joined = name == "encoder" and type(around).__name__.endswith("EncoderDecoderModel")
        if isinstance(around, PreTrainedModel) and not joined:
            return True
    return False


def _adopt(module: Any, ours: Any) -> str:
    """Change the class of `module` to `ours`. Returns '', or the reason why that is impossible."""
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
            remember_config(part)
    return ""


def _as_constructed(module: Any, ours: Any) -> nn.Module:
    """A new model of class `ours` with the module's configuration, on the meta device."""
    with torch.device("meta"):
        fresh = ours(copy.deepcopy(module.config))
    for path, part in fresh.named_modules():
        given = module.get_submodule(path)
        for name in ("pooler", "pooler_activation"):  # add_pooling_layer=False, which is not in the configuration
            if name in part._modules and getattr(given, name, part) is None:
                setattr(part, name, None)
    return fresh


def release(model: nn.Module) -> None:
    """Undo `adopt`: revert the class of every module."""
    for module in model.modules():
        former = module.__dict__.pop(_FORMER, None)
        if former is not None:
            module.__class__ = former
            module.__dict__.pop(CONFIG, None)
            module.__dict__.pop(BUILT, None)
            module.__dict__.pop(READ_WHOLE, None)
            stock.forget(module)
