"""Linear, norm and dropout modules through the fused ops; a module that is more than plain is called as it is."""

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .. import ops
from ..ops.linear_int8 import Int8Norm
from ..ops.linear_panel import PanelWeight
from .quantized import int8_linears, is_int8

__all__ = [
    "add_norm",
    "add_norm_sum",
    "dropout_p",
    "is_plain",
    "is_rms_norm",
    "is_transposed",
    "linear",
    "norm",
    "norm_of",
    "projections",
    "reading_copies",
    "register_transposed",
    "rms_norm_of",
]

# Classes that compute x W + b with W (in, out), such as HF's Conv1D; families add theirs.
_TRANSPOSED: set[type[nn.Module]] = set()


def register_transposed(kind: type[nn.Module]) -> None:
    """Let `linear` compute plain modules of this class, which hold a weight (in, out) and a bias, by the fused ops."""
    _TRANSPOSED.add(kind)


# Weights that have a copy laid out for few rows, and which threads read it: (thread, id of the weight) -> the copy.
_copies: dict[tuple[int, int], PanelWeight] = {}


@contextlib.contextmanager
def reading_copies(copies: Mapping[int, PanelWeight]) -> Iterator[None]:
    """Inside, on this thread, `linear` multiplies by the copy of a weight in place of the weight where there is one.
    copies: by the id of the weight, (out, in) whichever way the weight lies. Without gradients only."""
    keys = {(threading.get_ident(), weight): copy for weight, copy in copies.items()}
    _copies.update(keys)
    try:
        yield
    finally:
        for key in keys:
            del _copies[key]


def _weight(module: Any) -> torch.Tensor | PanelWeight:
    """(out, in) of a plain linear module."""
    weight = module.weight
    if not torch.compiler.is_compiling() and _copies:
        copy = _copies.get((threading.get_ident(), id(weight)))
        if copy is not None:
            return copy
    return weight.t() if type(module) in _TRANSPOSED else weight


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """True when a module's forward is its class's own: no subclass (LoRA, quantised, parametrised), no hooks, no
    replaced forward (accelerate's device maps)."""
    return type(module) is kind and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def is_transposed(module: Any) -> bool:
    """True for a plain module of a registered class that computes x W + b."""
    return type(module) in _TRANSPOSED and is_plain(module, type(module))


def linear(module: Any, x: torch.Tensor, activation: str | None = None) -> torch.Tensor:
    """activation(x W^T + b)."""
    if is_plain(module, nn.Linear) or is_transposed(module):
        return ops.linear(x, _weight(module), module.bias, activation)
    if is_int8(module):
        return module.forward(x, activation)
    y = module(x)
    return y if activation is None else ops.bias_activation(y, None, activation)


def projections(
    modules: Sequence[Any], x: torch.Tensor, int8_dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, ...]:
    """W_i x + b_i of each module; those that are more than plain are called.
    int8_dtype: of the results where the modules are Int8Linear; None for x's."""
    if is_int8(*modules):
        return int8_linears(list(modules), x, int8_dtype).split([m.out_features for m in modules], -1)
    if all(is_plain(module, nn.Linear) for module in modules):
        return ops.projections(x, [_weight(m) for m in modules], [m.bias for m in modules])
    return tuple(linear(module, x) for module in modules)


def is_rms_norm(module: Any) -> bool:
    """True for torch's RMSNorm and for a family's own class that says so: `is_rms_norm`, with weight and eps."""
    kind = type(module)
    return (kind is nn.RMSNorm or "is_rms_norm" in kind.__dict__) and is_plain(module, kind)


def norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    if is_plain(module, nn.LayerNorm):
        return ops.layer_norm(x, module.normalized_shape, module.weight, module.bias, module.eps)
    if is_rms_norm(module):
        return rms_norm_of(module, x)
    return module(x)


def rms_norm_of(module: Any, x: torch.Tensor) -> torch.Tensor:
    """What a norm computes that is_rms_norm knows, whatever hooks it has."""
    return _of_weight(ops.rms_norm(x, module.weight.shape, _rms_weight(module), module.eps), module)


def _rms_weight(module: Any) -> torch.Tensor:
    """What a family's norm multiplies by: its weight, or Gemma's 1 + weight."""
    weight = module.weight
    if not getattr(module, "adds_one", False):
        return weight
    return 1.0 + (weight if weight.dtype == torch.float64 else weight.float())


def norm_of(module: Any) -> tuple[Int8Norm, bool] | None:
    """What a plain norm module holds, and whether it is an RMS norm; None for any other."""
    if is_plain(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
        return Int8Norm(module.weight, module.bias, module.eps), False
    if is_rms_norm(module) and not getattr(module, "adds_one", False):
        eps = torch.finfo(torch.float32).eps if module.eps is None else module.eps
        return Int8Norm(module.weight, None, eps), True
    return None


def _of_weight(y: torch.Tensor, module: Any) -> torch.Tensor:
    """A family's norm goes on in the dtype of its weight, where the residual sum is wider."""
    return y if type(module) is nn.RMSNorm or y.dtype == module.weight.dtype else y.to(module.weight.dtype)


def add_norm(module: Any, x: torch.Tensor, residual: torch.Tensor, p: float) -> torch.Tensor:
    """norm(residual + dropout(x))."""
    return add_norm_sum(module, x, residual, p, False)[0]


def add_norm_sum(
    module: Any, x: torch.Tensor, residual: torch.Tensor, p: float, return_sum: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(norm(s), s) with s = residual + dropout(x)."""
    extra: dict[str, Any] = {"dropout_p": p, "return_sum": return_sum}
    if is_plain(module, nn.LayerNorm):
        y = ops.add_layer_norm(x, residual, module.weight, module.bias, module.eps, **extra)
        return y if return_sum else (y, None)
    if is_rms_norm(module):
        y = ops.add_rms_norm(x, residual, _rms_weight(module), module.eps, **extra)
        y, total = y if return_sum else (y, None)
        return _of_weight(y, module), total
    total = residual + ops.dropout(x, p)
    return module(total), total


def dropout_p(module: nn.Module | float | None) -> float:
    """The probability a dropout module applies now; read live, as users and trainers change it. A number is itself."""
    if isinstance(module, float):
        return module
    return float(getattr(module, "p", 0.0)) if module is not None and module.training else 0.0
