"""Replaces the Int8Linear modules of a model by plain linear layers with the same weights in floating point."""

from typing import Any

import torch
from torch import nn

from .quantized import Int8Linear
from .quantizing import NEED_GRADIENTS, swap

__all__ = ["restore"]


def restore(model: nn.Module) -> int:
    """Replace each Int8Linear by a layer of the class that it replaced. Parameters require gradients as before the
    model was quantised. Returns the number of replaced layers."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    made = {module: _plain(module, dtype) for module in model.modules() if isinstance(module, Int8Linear)}
    swap(model, made)
    _require_gradients(model)
    return len(made)


def _plain(module: Int8Linear, dtype: torch.dtype) -> nn.Module:
    kind: Any = module.replaces
    out, inner, biased = module.out_features, module.in_features, module.bias is not None
    with torch.device("meta"):
        made = nn.Linear(inner, out, biased) if issubclass(kind, nn.Linear) else kind(out, inner)
    weight = module.dequantized().to(dtype if module.bias is None else module.bias.dtype)
    made.weight = nn.Parameter(weight if isinstance(made, nn.Linear) else weight.t().contiguous())
    if module.bias is not None:
        made.bias = nn.Parameter(module.bias.detach())
    return made.train(module.training)


def _require_gradients(model: nn.Module) -> None:
    model.requires_grad_(True)
    for root in model.modules():
        names = root.__dict__.pop(NEED_GRADIENTS, None)
        if names is not None:
            for name, parameter in root.named_parameters():
                parameter.requires_grad_(name in names)
