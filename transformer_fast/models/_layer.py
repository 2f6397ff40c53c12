"""Layers and attention modules that are called in two ways: by our stack, and by HF's code as HF's own."""

import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..layers import SlotTable, StackCall, transformer_layer

__all__ = ["CONFIG", "AttentionModule", "Layer", "kept_layers"]

# Where an attention module keeps its configuration beside __dict__["config"], which torch 2.11's compiler takes for
# the property below again, without end.
CONFIG = "_config_of_layer"


def kept_layers(stack: Any, layers: Iterable[nn.Module]) -> list[nn.Module]:
    """All layers, or in training those that LayerDrop (Fan et al., 2020) keeps, drawn as HF draws them."""
    p = getattr(stack, "layerdrop", 0.0)
    if not stack.training or not p:
        return list(layers)
    return [layer for layer in layers if not torch.rand([]) < p]


class Layer:
    """Before HF's layer class: one fused layer when our stack calls (see layers.run_layers), HF's own forward
    for everybody else."""

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
    """A configuration that asks for our attention and is the user's in everything else."""

    _attn_implementation = "transformer_fast"

    def __init__(self, config: Any):
        self._config = config

    def __getattr__(self, name: str):
        return getattr(self._config, name)


class AttentionModule:
    """Before HF's class for attention: where its forward would call torch's scaled_dot_product_attention it calls ours,
    with the same masks. The module's configuration stays as it is; what is compiled or exported keeps torch's."""

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
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        before, _thread.attends = getattr(_thread, "attends", False), True
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            _thread.attends = before
