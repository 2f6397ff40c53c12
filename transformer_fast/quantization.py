"""quantize(model, "int8" | "bf16"): low precision for inference on the CPU."""

import sys
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .backends import native
from .layers.dequantizing import restore
from .layers.quantized import Int8Linear
from .layers.quantizing import (
    Quantized,
    check_group,
    find_modules,
    is_int8_model,
    module_names,
    quantized_modules,
    replace,
)
from .ops.linear_int8 import LONG_GROUP

__all__ = ["PRECISIONS", "Quantized", "dequantize", "quantize", "quantized_modules"]

PRECISIONS = ("int8", "bf16")


def quantize(
    model: nn.Module, precision: str = "int8", *, skip: Iterable[str] | None = (), group: int = LONG_GROUP
) -> Any:
    """Convert a model to low precision, in place, for inference on the CPU.

    An output layer that shares its weight with the token embedding gets an int8 copy; the embedding table is unchanged.

    Args:
        model: any torch.nn.Module.
        precision: "int8": every linear layer (nn.Linear, HF's Conv1D) becomes an Int8Linear. Weights are int8, with a
            scale per `group` inputs of an output. Inputs are quantised per row in each call, with a scale and a zero
            point per `group`. Sums within a group are exact int32. Attention, norms and embeddings keep their dtype. No
            calibration data is needed. "bf16": the model in bfloat16, if the processor can multiply it; else the model
            is unchanged, with a warning.
        skip: names of modules, as in named_modules, that are left unchanged with all their submodules; "*" stands for
            any text ("*.query"). Layers with
            fewer than 64 outputs, poolers, and linear layers that are not plain (LoRA, hooks, other quantisers) or
            whose weight other code reads are also left unchanged; quantized_modules(model) lists them. For "int8" only.
        group: 32, 64, 128 or 256 inputs per scale; smaller groups are more accurate and slower. With 256, layers with
            fewer than 768 inputs, or not a multiple of 256, get 128. For "int8" only.

    Returns:
        The model.

    Raises:
        ValueError: for an unknown precision or group, a name in `skip` that the model does not have, weights with NaN
            or infinity or on the meta device (the model is then unchanged), a model that is quantised already, or one
            that is itself a linear layer.
        TypeError: if the model is not a torch.nn.Module, or `skip` is not a list of names.

    Examples:
        >>> import transformer_fast
        >>> from transformer_fast.demo import locate
        >>> model = transformer_fast.quantize(transformer_fast.AutoModel.from_pretrained(locate()).eval())
    """
    if not isinstance(precision, str) or precision not in PRECISIONS:
        raise ValueError(f"precision: wanted one of {', '.join(PRECISIONS)}, got {precision!r}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: wanted an nn.Module, got {type(model).__name__}")
    check_group(group)
    skip = module_names(skip)
    if is_int8_model(model):
        raise ValueError("model: is quantised already")
    if precision == "bf16":
        if skip or group != LONG_GROUP:
            raise ValueError('skip, group: are for "int8" only, as "bf16" converts the whole model')
        return _to_bfloat16(model)
    skip = find_modules(model, skip)
    if "transformers.modeling_utils" not in sys.modules:  # then no part of the model is one of transformers
        count = replace(model, skip, group)
    else:
        from .models._quantizer import mark  # registers its linear layers too

        count = replace(model, skip, group)
        mark(model, skip, group)
    if not count:
        warnings.warn(
            f"model: {type(model).__name__} has no linear layer that can be int8; quantized_modules says why",
            stacklevel=2,
        )
    return model


def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> Any:
    """Put the int8 layers of a model back in floating point, in place, for example to train it.

    The weights are the rounded ones: scale times int8. An output layer that shared its weight with the token embedding
    shares it again. Parameters require gradients as they did before the model was quantised. A model of transformers
    is saved as a checkpoint in floating point afterwards. `model.dequantize()` of transformers does the same.

    Args:
        model: a model that quantize(model, "int8") has changed, or that was loaded in int8.
        dtype: dtype of the whole model afterwards. None: that of its parameters that are not int8.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: if no layer of the model is int8, or `dtype` is not a floating-point dtype.
        TypeError: if the model is not a torch.nn.Module.

    Examples:
        >>> import transformer_fast
        >>> from transformer_fast.demo import locate
        >>> model = transformer_fast.quantize(transformer_fast.AutoModel.from_pretrained(locate()))
        >>> model = transformer_fast.dequantize(model).train()
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: wanted an nn.Module, got {type(model).__name__}")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype: wanted a floating-point dtype, got {dtype!r}")
    if isinstance(model, Int8Linear):
        raise ValueError("model: is itself an Int8Linear, which cannot be replaced in place")
    if not is_int8_model(model):
        raise ValueError("model: has no int8 layer")
    if "transformers.modeling_utils" not in sys.modules:
        restore(model)
        return model if dtype is None else model.to(dtype)
    from .models import _quantizer

    return _quantizer.dequantize(model, dtype)


def _to_bfloat16(model: nn.Module) -> nn.Module:
    device = next((p.device.type for p in model.parameters()), "cpu")
    if device == "cpu" and (reason := why_not_bfloat16()):
        warnings.warn(f"precision 'bf16': the model is unchanged, as {reason}", stacklevel=3)
        return model
    return model.to(torch.bfloat16).eval().requires_grad_(False)


def why_not_bfloat16() -> str:
    """Why a model on the CPU would not be faster in bfloat16; '' if it would."""
    if missing := native.load():
        return f"there are no CPU kernels here: {missing}"
    isa = native.current_isa()
    return "" if native.multiplies_bfloat16() else f"{isa}, which runs here, has no instructions that multiply bfloat16"
