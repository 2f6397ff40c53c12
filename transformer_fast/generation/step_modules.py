"""Reads the weights of modules, for native decoding steps that bypass the modules."""

from typing import Any

import torch
from torch import nn

from ..layers.projection import is_plain, is_transposed
from ..layers.quantized import is_int8
from ..ops.decoder_tensors import Projection, StepTensors
from ..ops.linear_int8 import Int8Weight

__all__ = ["is_hooked", "is_known", "projection_of", "weight_of", "why_not_tensors"]

_FLOATS = (torch.float32, torch.bfloat16)


def is_hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def is_known(module: nn.Module, kind: type[nn.Module]) -> bool:
    """True for `kind` itself and for variants that model files define; False for classes of adapters."""
    cls = type(module)
    package = __package__.split(".")[0]
    known = ("transformers.models.", f"{package}.models.", f"{package}.layers.")
    return cls is kind or cls.__module__.startswith(known)


def weight_of(module: Any) -> torch.Tensor | Int8Weight | None:
    if is_int8(module):
        weight = module.int8_weight()
        return None if weight.data is None else weight
    return module.weight if is_plain(module, nn.Linear) or is_transposed(module) else None


def projection_of(*modules: Any) -> Projection:
    return Projection(
        tuple(weight_of(m) for m in modules),
        tuple(m.bias for m in modules),
        is_transposed(modules[0]),  # type: ignore[misc]
    )


def why_not_tensors(tensors: StepTensors) -> str:
    """'' if a native step can read all of these tensors, else the reason why not."""
    for t in tensors.sources():
        if type(t) not in (torch.Tensor, nn.Parameter):
            return f"a weight is a {type(t).__name__}"
        if t.device.type != "cpu":
            return f"device {t.device} is not cpu"
        if t.dtype not in (*_FLOATS, torch.int8):
            return f"dtype {t.dtype} is not float32 or bfloat16"
    return ""
