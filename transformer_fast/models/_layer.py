"""Mixins for layers and attention modules, which are called in two ways: by our stack, and by HF's code."""

import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..layers import SlotTable, StackCall, transformer_layer
from ..ops import concrete

__all__ = ["CONFIG", "AttentionModule", "Layer", "kept_layers"]

# An attention module keeps its configuration under this name too: torch 2.11's compiler reads __dict__["config"]
# through the property below, in an endless recursion.
CONFIG = "_config_of_layer"


def kept_layers(stack: Any, layers: Iterable[nn.Module]) -> list[nn.Module]:
    """All layers; in training those that LayerDrop (Fan et al., 2020) keeps, with the same random draws as HF."""
    p = getattr(stack, "layerdrop", 0.0)
    if not stack.training or not p:
        return list(layers)
    return [layer for layer in layers if not torch.rand([]) < p]


class Layer:
    """Mixin, placed before HF's layer class: a fused layer when our stack calls it (see layers.run_layers), HF's own
    forward for any other caller."""

    _table: SlotTable

    def slots(self) -> SlotTable:
        return self._table

    def forward(self, hidden_states, *args, **kwargs):
        if args and isinstance(args[0], StackCall):
            return self._fused(hidden_states, *args, **kwargs)
        return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]

    def _fused(self, hidden_states, call, index, first_only=False, encoder_states=None, past_key_values=None):
        weights = self.slots().read(self)  # type: ignore[arg-type]
        return transformer_layer(weights, hidden_states, call, index, first_only, past_key_values, encoder_states)


_thread = threading.local()


class _WithKernel:
    """The user's configuration with another attention implementation: ours."""

    _attn_implementation = "transformer_fast"

    def __init__(self, config: Any):
        self._config = config

    def __getattr__(self, name: str):
        return getattr(self._config, name)


class AttentionModule:
    """Mixin, placed before HF's attention class: its forward calls our attention instead of torch's
    scaled_dot_product_attention, with the same masks. The module's configuration is not changed. Under torch.compile
    and export, torch's is called.

    _averages: HF's sdpa gives a query without keys the mean of all values, so it is called for masks with such queries.
    """

    _averages = False

    @property
    def config(self):
        config = self._config_of_layer
        if torch.compiler.is_compiling() or not getattr(_thread, "attends", False):
            return config
        return _WithKernel(config) if config._attn_implementation == "sdpa" else config

    @config.setter
    def config(self, value):
        self.__dict__["config"] = value
        self.keep_config()

    def keep_config(self) -> None:
        self.__dict__[CONFIG] = self.__dict__["config"]

    def forward(self, *args, **kwargs):
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or self._is_left(args, kwargs):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        before, _thread.attends = getattr(_thread, "attends", False), True
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            _thread.attends = before

    def _is_left(self, args: tuple, kwargs: dict) -> bool:
        """Whether HF's attention is called. The mask alone decides, as checkpointing calls the layer twice."""
        if not self._averages:
            return False
        masks = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.dtype == torch.bool]
        if (
            not masks
            or not all(map(concrete, masks))
            or (masks[0].is_cuda and torch.cuda.is_current_stream_capturing())
        ):
            return False
        return any(not bool(mask.any(-1).all()) for mask in masks)
