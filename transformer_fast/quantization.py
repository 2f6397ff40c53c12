"""quantize(model, "int8" | "bf16"): low precision for inference on the CPU."""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .backends import native
from .layers.quantized import Int8Linear
from .layers.quantizing import Quantized, quantized_modules, replace
from .ops.linear_int8 import GROUPS, LONG_GROUP

__all__ = ["PRECISIONS", "Quantized", "quantize", "quantized_modules"]

PRECISIONS = ("int8", "bf16")


def quantize(model: nn.Module, precision: str = "int8", *, skip: Iterable[str] = (), group: int = LONG_GROUP) -> Any:
    """Convert a model to low precision, in place, for inference on the CPU.

    An output layer that shares its weight with the token embedding gets an int8 copy; the embedding table is unchanged.

    Args:
        model: any torch.nn.Module.
        precision: "int8": every linear layer (nn.Linear, HF's Conv1D) becomes an Int8Linear. Weights are int8, with a
            scale per `group` inputs of an output. Inputs are quantised per row in each call, with a scale and a zero
            point per `group`. Sums within a group are exact int32. Attention, norms and embeddings keep their dtype. No
            calibration data is needed. "bf16": the model in bfloat16, if the processor can multiply it; else the model
            is unchanged, with a warning.
        skip: names of modules, as in named_modules, that are left unchanged with all their submodules. Layers with
            fewer than 64 outputs, poolers, and linear layers that are not plain (LoRA, hooks, other quantisers) are
            also left unchanged; quantized_modules(model) lists them.
        group: 32, 64, 128 or 256 inputs per scale; smaller groups are more accurate and slower. With 256, layers with
            fewer than 768 inputs, or not a multiple of 256, get 128.

    Returns:
        The model.

    Raises:
        ValueError: for an unknown precision or group, a name in `skip` that the model does not have, weights with NaN
            or infinity (the model is then unchanged), or a model that is quantised already.
        TypeError: if the model is not a torch.nn.Module.

    Examples:
        >>> import transformer_fast
        >>> from transformer_fast.demo import locate
        >>> model = transformer_fast.quantize(transformer_fast.AutoModel.from_pretrained(locate()).eval())
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: wanted one of {', '.join(PRECISIONS)}, got {precision!r}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: wanted an nn.Module, got {type(model).__name__}")
    if group not in GROUPS:
        raise ValueError(f"group: wanted one of {', '.join(map(str, GROUPS))}, got {group}")
    if any(isinstance(m, Int8Linear) for m in model.modules()):
        raise ValueError("model: is quantised already")
    if precision == "bf16":
        return _to_bfloat16(model)
    skip = tuple(skip)
    replace(model, skip, group)
    if hasattr(model, "save_pretrained"):
        from .models._quantizer import mark

        mark(model, skip, group)
    return model


def _to_bfloat16(model: nn.Module) -> nn.Module:
    device = next((p.device.type for p in model.parameters()), "cpu")
    if device == "cpu" and (native.load() or not native.multiplies_bfloat16()):
        warnings.warn(
            "this processor has no instructions that multiply bfloat16 (avx512_bf16), so it would be slower than "
            "float32: the model is unchanged",
            stacklevel=3,
        )
        return model
    return model.to(torch.bfloat16).eval().requires_grad_(False)
