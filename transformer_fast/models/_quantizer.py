"""int8 through Hugging Face's quantizer registry: loading with quantization_config=Int8Config(), and saving."""

import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..layers.projection import register_transposed
from ..layers.quantized import Int8Linear
from ..layers.quantizing import check_group, is_int8_model, module_names, replace, replace_empty
from ..ops.linear_int8 import LONG_GROUP
from . import _int8_contents

__all__ = ["Int8Config"]

METHOD = "transformer_fast_int8"
logger = logging.get_logger(__name__)
register_transposed(Conv1D)


@register_quantization_config(METHOD)
class Int8Config(QuantizationConfigMixin):
    """For from_pretrained(..., quantization_config=Int8Config()): linear layers in int8, see transformer_fast.quantize.

    Args:
        skip: names of modules to leave as they are.
        group: inputs that share a scale, 32, 64, 128 or 256; see transformer_fast.quantize.

    Raises:
        ValueError: for another group.
        TypeError: for a `skip` that is not a list of names, or an unknown argument.

    Examples:
        >>> import transformer_fast
        >>> from transformer_fast.demo import locate
        >>> config = transformer_fast.Int8Config(skip=["pooler"])
        >>> model = transformer_fast.AutoModel.from_pretrained(locate(), quantization_config=config)
    """

    def __init__(self, skip: Any = (), group: int = LONG_GROUP, quant_method: str = METHOD, **kwargs):
        check_group(group)
        if kwargs:
            raise TypeError(f"{', '.join(kwargs)}: wanted skip and group, which are all that Int8Config takes")
        self.quant_method = METHOD
        self.skip = list(module_names(skip))
        self.group = group


@register_quantizer(METHOD)
class Int8Quantizer(HfQuantizer):
    """Replaces linear modules: before an int8 checkpoint is read, or after a floating-point one was read."""

    quantization_config: Int8Config

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        if dtype != torch.float32:
            logger.info(f"Modules that are not int8 are float32, not {dtype}: quantization_config is an Int8Config.")
        return torch.float32

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        if self.pre_quantized:
            config, names = self.quantization_config, None
            if checkpoint_files:
                stored = _int8_contents.int8_layers(checkpoint_files, config.group)
                names = _int8_contents.matching(model, stored)
                names = None if stored and not names else names  # transformers renames them in a way unknown here
            replace_empty(model, names, config.group, config.skip)
            untie(model)
        return model

    def _process_model_after_weight_loading(self, model, **kwargs):
        if self.pre_quantized:
            _check_scales(model)
        else:
            replace(model, self.quantization_config.skip, self.quantization_config.group)
            untie(model)
        model.eval().requires_grad_(False)
        return model

    def is_serializable(self, *args, **kwargs) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _check_scales(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, Int8Linear) and not bool(module.weight_scale.isfinite().all()):
            raise ValueError(f"{name}.weight_scale: wanted finite numbers, got NaN or infinity")


def untie(model: nn.Module) -> None:
    """Untie an int8 output layer from the embedding table: it has a weight of its own."""
    names = [name for name, module in model.named_modules() if isinstance(module, Int8Linear)]
    for prefix, part in model.named_modules():
        if not isinstance(part, PreTrainedModel):
            continue
        start = f"{prefix}." if prefix else ""
        own = [f"{name[len(start) :]}.weight" for name in names if name.startswith(start)]
        for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
            keys = getattr(part, attribute, None)
            if keys and isinstance(keys, dict):
                setattr(part, attribute, {k: v for k, v in keys.items() if not any(_is(k, name) for name in own)})


def _is(pattern: str, name: str) -> bool:
    return pattern == name or re.fullmatch(pattern, name) is not None


def mark(model: nn.Module, skip: tuple[str, ...], group: int) -> None:
    """Mark the models of transformers in `model`, which was quantised in memory, so that they are saved like those that
    were loaded in int8."""
    marked: list[str] = []
    for path, part in model.named_modules():
        prefix = f"{path}." if path else ""
        if not isinstance(part, PreTrainedModel) or any(path.startswith(other) for other in marked):
            continue
        marked.append(prefix)
        if not is_int8_model(part):
            continue
        config = Int8Config([name.removeprefix(prefix) for name in skip if name.startswith(prefix)], group)
        whole: Any = part
        whole.hf_quantizer = Int8Quantizer(config, pre_quantized=False)
        whole.is_quantized, whole.quantization_method = True, METHOD
        whole.config.quantization_config = config
        untie(part)
