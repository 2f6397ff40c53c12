"""The int8 weights in the files of a checkpoint. The files decide which layers of a model are made int8 before they are
read: a head may be new, or have been replaced after the others were quantised, and names differ between heads."""

import os
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from .._transformers import names_when_saved
from ..ops.linear_int8 import group_of

__all__ = ["int8_layers", "matching"]

_WEIGHT, _SCALE = ".weight", ".weight_scale"


class _Tensor(NamedTuple):
    file: str
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


def int8_layers(files: Iterable[str | os.PathLike], group: int) -> set[str]:
    """The names of the linear layers that are int8 in the files, as they are there.

    Raises ValueError that names file and tensor for weights without scales, scales without weights, and scales or
    weights of another dtype or shape than groups of `group` inputs (see group_of) need.
    """
    found: dict[str, _Tensor] = {}
    for file in files:
        found |= _contents(file)
    layers = set()
    for key, scale in found.items():
        if key.endswith(_WEIGHT) and scale.dtype == "I8" and key.removesuffix(_WEIGHT) + _SCALE not in found:
            raise ValueError(f"{scale.file}: {key} is int8, but there is no {key.removesuffix(_WEIGHT)}{_SCALE}")
        if not key.endswith(_SCALE):
            continue
        name = key.removesuffix(_SCALE)
        weight = found.get(name + _WEIGHT)
        if weight is None:
            raise ValueError(f"{scale.file}: there is a {key}, but no {name}{_WEIGHT}")
        if weight.dtype != "I8" or len(weight.shape) != 2:
            raise ValueError(f"{weight.file}: {name}{_WEIGHT}: wanted int8 (out, in), as it has scales, got {weight}")
        own = group_of(weight.shape[1], group)
        wanted = (weight.shape[0], -(-weight.shape[1] // own))
        if scale.shape != wanted or scale.dtype not in ("F32", "F16", "BF16"):
            raise ValueError(
                f"{scale.file}: {key}: wanted float32 {wanted}, for groups of {own} inputs (config.json) and the "
                f"weight {weight.shape}, got {scale}"
            )
        layers.add(name)
    return layers


def _contents(file: str | os.PathLike) -> dict[str, _Tensor]:
    path = os.fspath(file)
    if not path.endswith(".safetensors"):
        state: dict[str, Any] = torch.load(path, map_location="meta", weights_only=True)
        names = {torch.int8: "I8", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
        return {k: _Tensor(path, names.get(t.dtype, str(t.dtype)), tuple(t.shape)) for k, t in state.items()}
    from safetensors import safe_open

    with safe_open(path, "pt") as handle:
        parts = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118 (not a dict)
        return {key: _Tensor(path, part.get_dtype(), tuple(part.get_shape())) for key, part in parts.items()}


def matching(model: Any, layers: set[str]) -> set[str]:
    """The names in `model` of the `layers` of a checkpoint: the same, without or with the prefix of the base model, or
    under the names that transformers gives them in checkpoints."""
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    names = [name for name, m in model.named_modules() if isinstance(getattr(m, "weight", None), nn.Parameter)]
    saved = names_when_saved(model, [name + _WEIGHT for name in names])
    found = set()
    for name in names:
        other = saved.get(name + _WEIGHT, name).removesuffix(_WEIGHT)
        if not layers.isdisjoint({name, other, prefix + name, name.removeprefix(prefix)}):
            found.add(name)
    return found
