"""Runs Linear, norm and dropout modules by the fused ops. Modules that are not plain (subclassed, hooked) are
called."""

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
    "is_linear_class",
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

# Classes that compute x W + b with W (in, out), such as HF's Conv1D. Model families register theirs.
_TRANSPOSED: set[type[nn.Module]] = set()


def register_transposed(kind: type[nn.Module]) -> None:
    """Let `linear` run plain modules of class `kind`, with weight (in, out) and bias, by the fused ops."""
    _TRANSPOSED.add(kind)


# The panel copies that `linear` uses, per thread: (thread, id of the weight) -> copy.
_copies: dict[tuple[int, int], PanelWeight] = {}


@contextlib.contextmanager
def reading_copies(copies: Mapping[int, PanelWeight]) -> Iterator[None]:
    """In this context and thread, `linear` uses the copy of a weight where there is one. Only without gradients.
    copies: PanelWeights (out, in) by the id of the weight, whatever the weight's layout."""
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
    """True if a module is exactly of class `kind`, with the class's own forward: no subclass (LoRA, quantised,
    parametrised), no hooks, no replaced forward (accelerate's device maps)."""
    return type(module) is kind and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def is_linear_class(kind: type) -> bool:
    """True for nn.Linear and registered classes, not for their subclasses."""
    return kind is nn.Linear or kind in _TRANSPOSED


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
    """W_i x + b_i for each module; modules that are not plain are called. int8_dtype: dtype of the results if the
    modules are Int8Linear; None for x's."""
    if is_int8(*modules):
        return int8_linears(list(modules), x, int8_dtype).split([m.out_features for m in modules], -1)
    if all(is_plain(module, nn.Linear) for module in modules):
        return ops.projections(x, [_weight(m) for m in modules], [m.bias for m in modules])
    return tuple(linear(module, x) for module in modules)


def is_rms_norm(module: Any) -> bool:
    """True for a plain RMS norm: torch's RMSNorm, or a family's class that defines `is_rms_norm`, weight and eps."""
    kind = type(module)
    return (kind is nn.RMSNorm or "is_rms_norm" in kind.__dict__) and is_plain(module, kind)


def norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    if is_plain(module, nn.LayerNorm):
        return ops.layer_norm(x, module.normalized_shape, module.weight, module.bias, module.eps)
    if is_rms_norm(module):
        return rms_norm_of(module, x)
    return module(x)


def rms_norm_of(module: Any, x: torch.Tensor) -> torch.Tensor:
    """The result of an RMS norm by the fused op, without its hooks. module: one that is_rms_norm accepts, except for
    hooks."""
    return _of_weight(ops.rms_norm(x, module.weight.shape, _rms_weight(module), module.eps), module)


def _rms_weight(module: Any) -> torch.Tensor:
    """The factor of an RMS norm: its weight, or 1 + weight for Gemma's."""
    weight = module.weight
    if not getattr(module, "adds_one", False):
        return weight
    return 1.0 + (weight if weight.dtype == torch.float64 else weight.float())


def norm_of(module: Any) -> tuple[Int8Norm, bool] | None:
    """The parameters of a plain norm module, and whether it is an RMS norm; None for any other module."""
    if is_plain(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
        return Int8Norm(module.weight, module.bias, module.eps), False
    if is_rms_norm(module) and not getattr(module, "adds_one", False):
        eps = torch.finfo(torch.float32).eps if module.eps is None else module.eps
        return Int8Norm(module.weight, None, eps), True
    return None


def _of_weight(y: torch.Tensor, module: Any) -> torch.Tensor:
    """Convert the result of a family's norm to the dtype of its weight, if the residual sum has another dtype. Gemma's
    norms keep the sum's."""
    kept = type(module) is nn.RMSNorm or getattr(module, "adds_one", False) or y.dtype == module.weight.dtype
    return y if kept else y.to(module.weight.dtype)


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
    """The probability that a dropout module applies now. It is read in every call, as users and trainers change it. A
    number is returned unchanged."""
    if isinstance(module, float):
        return module
    return float(getattr(module, "p", 0.0)) if module is not None and module.training else 0.0
