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

from ..layers.dequantizing import restore
from ..layers.projection import register_transposed
from ..layers.quantized import Int8Linear
from ..layers.quantizing import check_group, find_modules, is_int8_model, module_names, replace, replace_empty
from ..ops.linear_int8 import LONG_GROUP
from . import _int8_contents

__all__ = ["Int8Config", "dequantize"]

METHOD = "transformer_fast_int8"
_TIED = "_tied_before_int8"  # attribute of a model: what named its tied weights before an output layer was untied
logger = logging.get_logger(__name__)
register_transposed(Conv1D)


@register_quantization_config(METHOD)
class Int8Config(QuantizationConfigMixin):
    """For from_pretrained(..., quantization_config=Int8Config()): linear layers in int8, see transformer_fast.quantize.

    Args:
        skip: names of modules to leave as they are, as for transformer_fast.quantize.
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
            config = self.quantization_config
            config.skip = list(find_modules(model, config.skip))
            replace(model, config.skip, config.group)
            untie(model)
        model.eval().requires_grad_(False)
        return model

    def dequantize(self, model, dtype=None):
        """As transformers', whose models call it: the model in floating point, in `dtype` if it is given."""
        return dequantize(model, dtype)

    def is_serializable(self, *args, **kwargs) -> bool:
        return True

    # Trainer asks for both, even if it only evaluates. Training is refused by the model's train.
    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True


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
                left = {k: v for k, v in keys.items() if not any(_is(k, name) for name in own)}
                if len(left) < len(keys):
                    part.__dict__.setdefault(_TIED, {}).setdefault(attribute, keys)
                    setattr(part, attribute, left)


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


def dequantize(model: Any, dtype: torch.dtype | None = None) -> Any:
    """Put the int8 layers of a model back in floating point, in place, and forget that it was quantised. dtype: of the
    whole model afterwards; None: its own."""
    restore(model)
    for part in model.modules():
        if not isinstance(part, PreTrainedModel):
            continue
        quantizer: Any = getattr(part, "hf_quantizer", None)
        if isinstance(quantizer, Int8Quantizer):
            quantizer.remove_quantization_config(part)
        # Parts of a model may have copies of its configuration.
        if isinstance(getattr(part.config, "quantization_config", None), Int8Config | dict):
            del part.config.quantization_config
        _tie_again(part)
    return model if dtype is None else model.to(dtype)


def _tie_again(part: Any) -> None:
    """Tie the output layer to the embedding table again if its int8 weight was made from it."""
    before = part.__dict__.pop(_TIED, {})
    pairs = before.get("all_tied_weights_keys", {})
    if not before or not all(_rounded(part.get_parameter(k), part.get_parameter(v)) for k, v in pairs.items()):
        return
    for attribute, keys in before.items():
        setattr(part, attribute, keys)
    part.tie_weights()


def _rounded(weight: torch.Tensor, table: torch.Tensor) -> bool:
    if weight is table:
        return True
    return weight.shape == table.shape and bool((weight - table).norm() <= 0.1 * table.norm())
