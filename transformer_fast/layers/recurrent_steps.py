"""A plain GRU or LSTM run one step at a time, for inputs that depend on the previous step."""

from typing import Any

import torch
from torch import nn

from .. import ops
from ..ops.step_weight import StepWeight, gru_step, lstm_step

__all__ = ["RecurrentSteps"]


class RecurrentSteps:
    """All layers of a module in one direction, for T steps.

    words: (B, T, E), the part of the first layer's input that is known for all steps; its product is computed at once.
    The rest of the input, (B, in - E), is passed in each step. hidden, memory: (layers, B, H) before the first step;
    memory is None for a GRU.
    """

    def __init__(self, module: nn.RNNBase, words: torch.Tensor, hidden: torch.Tensor, memory: torch.Tensor | None):
        batch, steps, width = words.shape
        self._module: Any = module
        self._dropout = float(module.dropout) if module.training else 0.0
        self.hidden, self.memory = list(hidden.unbind(0)), None if memory is None else list(memory.unbind(0))
        first = self._parameter("weight_ih", 0)
        self._words = ops.linear(words, first[:, :width], self._parameter("bias_ih", 0)).unbind(1)
        inputs = [first[:, width:], *(self._parameter("weight_ih", i) for i in range(1, module.num_layers))]
        hiddens = [self._parameter("weight_hh", i) for i in range(module.num_layers)]
        self._inputs, self._hiddens = ([StepWeight(w, steps, batch) for w in ws] for ws in (inputs, hiddens))

    def _parameter(self, name: str, layer: int) -> torch.Tensor:
        return getattr(self._module, f"{name}_l{layer}", None)  # type: ignore[return-value]

    def __call__(self, step: int, x: torch.Tensor) -> torch.Tensor:
        """Run one step and return the last layer's hidden state (B, H). x: (B, in - E), the step's input after the
        words."""
        for layer, (of_input, of_hidden) in enumerate(zip(self._inputs, self._hiddens)):
            if layer:
                x = ops.dropout(x, self._dropout)
            gates, bias = of_input(x), self._parameter("bias_ih", layer)
            if not layer:
                gates = gates + self._words[step]
            elif bias is not None:
                gates = gates + bias
            products, bias = of_hidden(self.hidden[layer]), self._parameter("bias_hh", layer)
            if bias is not None:
                products = products + bias
            if self.memory is None:
                x = gru_step(gates, products, self.hidden[layer])
            else:
                x, self.memory[layer] = lstm_step(gates + products, self.memory[layer])
            self.hidden[layer] = x
        return x
