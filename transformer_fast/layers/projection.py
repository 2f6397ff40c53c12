"""Linear, norm and dropout modules through the fused ops; a module that is more than plain is called as it is."""

import torch
from torch import nn

from .. import ops

__all__ = ["add_norm", "add_norm_sum", "dropout_p", "is_plain", "linear", "norm", "packed_linear"]


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


def linear(module: nn.Module, x: torch.Tensor, activation: str | None = None) -> torch.Tensor:
    """activation(x W^T + b)."""
    if is_plain(module, nn.Linear):
        return ops.linear(x, module.weight, module.bias, activation)  # type: ignore[arg-type]
    y = module(x)
    return y if activation is None else ops.bias_activation(y, None, activation)


def packed_linear(modules: list[nn.Module], x: torch.Tensor) -> torch.Tensor | None:
    """x [W1; W2; ...]^T + [b1; b2; ...] as one GEMM, or None where the modules have to be called one by one."""
    for module in modules:
        if not is_plain(module, nn.Linear):
            return None
    biases = [m.bias for m in modules]
    if any(b is None for b in biases):
        if any(b is not None for b in biases):
            return None
        biases = None  # type: ignore[assignment]
    return ops.packed_linear(x, [m.weight for m in modules], biases)  # type: ignore[misc, arg-type]


def norm(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if is_plain(module, nn.LayerNorm):
        return ops.layer_norm(x, module.normalized_shape, module.weight, module.bias, module.eps)  # type: ignore[arg-type]
    if is_plain(module, nn.RMSNorm):
        return ops.rms_norm(x, module.normalized_shape, module.weight, module.eps)  # type: ignore[arg-type]
    return module(x)


def add_norm(module: nn.Module, x: torch.Tensor, residual: torch.Tensor, p: float) -> torch.Tensor:
    """norm(residual + dropout(x))."""
    return add_norm_sum(module, x, residual, p, False)[0]


def add_norm_sum(
    module: nn.Module, x: torch.Tensor, residual: torch.Tensor, p: float, return_sum: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(norm(s), s) with s = residual + dropout(x)."""
    if is_plain(module, nn.LayerNorm) or is_plain(module, nn.RMSNorm):
        extra = {"dropout_p": p, "return_sum": return_sum}
        if isinstance(module, nn.LayerNorm):
            y = ops.add_layer_norm(x, residual, module.weight, module.bias, module.eps, **extra)
        else:
            y = ops.add_rms_norm(x, residual, module.weight, module.eps, **extra)
        return y if return_sum else (y, None)
    total = residual + ops.dropout(x, p)
    return module(total), total


def dropout_p(module: nn.Module | None) -> float:
    """The probability a dropout module applies now; read live, as users and trainers change it."""
    return float(getattr(module, "p", 0.0)) if module is not None and module.training else 0.0
