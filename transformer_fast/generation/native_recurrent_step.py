"""A recurrent decoder on the CPU by one native call a token: see ops.recurrent_step for the arithmetic.

A model says what its decoder is made of by a RecurrentDescription, from `model.recurrent_description()`. What the
native step cannot serve has a reason (why_not) and goes step by step through the modules, by RecurrentStepper.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..backends import memory, native
from ..layers.embeddings import check_indices
from ..layers.projection import is_plain
from ..ops.recurrent_step import CellTensors, RecurrentSource, RecurrentTensors, RecurrentWeights, wide
from .prompts import encoder_mask, encoder_states, why_not_prompt
from .recurrent_step import RecurrentStepper
from .step_modules import is_hooked, projection_of, weight_of, why_not_tensors
from .stepper import Prompt
from .weights import decoder_copies, head_screen

__all__ = ["NativeRecurrentStepper", "RecurrentDescription"]

_USELESS = 0.5  # of the logits: where so many have to be computed, all are
_SHORT = 8  # prompts up to here go through the step, token by token


@dataclass
class RecurrentDescription:
    """A recurrent decoder for generation: its modules, and what is not in them.

    roots: the modules whose trees are left out by the native step: hooks in them would not run.
    rnn: the cells, a GRU or LSTM in one direction.
    query, readout: linear layers or None; score_weight: of additive scores, or None.
    attends: whether scores find the context; else, with maxout, it is one state of each source.
    start: of the encoder's output: the state before the first step, which has hidden, cell, feed and keys.
    refused: why no native step may be made of it; '' where one may.
    """

    roots: tuple[nn.Module, ...]
    token: Any
    rnn: Any
    head: Any
    query: Any
    score_weight: torch.Tensor | None
    readout: Any
    maxout: bool
    attends: bool
    start: Callable[[Any], Any]
    refused: str = ""

    def why_not(self) -> str:
        """'' when the native step computes what the modules would, else the reason why not."""
        return native.load() or self._why_not_modules() or why_not_tensors(self.tensors())

    def _why_not_modules(self) -> str:
        if self.refused:
            return self.refused
        for root in self.roots:
            for name, module in root.named_modules():
                if is_hooked(module):
                    return f"{name or type(module).__name__} has hooks or a forward of its own"
                if module.training:
                    return f"{name or type(module).__name__} is in training mode"
        if not any(is_plain(self.rnn, kind) for kind in (nn.GRU, nn.LSTM)):
            return f"the cells are a {type(self.rnn).__name__}, not a plain GRU or LSTM"
        if self.rnn.bidirectional or getattr(self.rnn, "proj_size", 0):
            return "the cells' states are projected or go both ways"
        if not is_plain(self.token, nn.Embedding):
            return f"the embedding is a {type(self.token).__name__}, not a plain embedding"
        if self.token.max_norm is not None:
            return "the embedding renormalises its rows"
        for name in ("query", "readout", "head"):
            module = getattr(self, name)
            if module is not None and weight_of(module) is None:
                return f"the {name} is a {type(module).__name__}, not a plain linear layer"
        return ""

    def tensors(self) -> RecurrentTensors:
        """The weights as they are now."""
        rnn = self.rnn
        names = ("weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if rnn.bias else ()))
        cells = [CellTensors(*(getattr(rnn, f"{name}_l{i}") for name in names)) for i in range(rnn.num_layers)]
        query, readout = (None if m is None else projection_of(m) for m in (self.query, self.readout))
        return RecurrentTensors(
            self.token.weight, cells, isinstance(rnn, nn.LSTM), projection_of(self.head), query, self.score_weight,
            readout, self.maxout,
        )  # fmt: skip


class NativeRecurrentStepper:
    """See Stepper. Logits are float32 and the caller's until the next call."""

    def __init__(self, model: Any, prompt: Prompt):
        self._model, self._prompt = model, prompt
        self._description: RecurrentDescription = model.recurrent_description()
        self._weights: Any = None  # a RecurrentWeights, from start on
        self._state: Any = None  # hidden, memory, feed of the rows
        self._source: Any = None  # a RecurrentSource
        self._logits: Any = None
        self._screen: Any = None  # a HeadScreen with its bounds; False: none

    @staticmethod
    def why_not(model: Any, prompt: Prompt) -> str:
        describe = getattr(model, "recurrent_description", None)
        if describe is None:
            return f"{type(model).__name__} does not describe a recurrent step"
        if prompt.input_ids.device.type != "cpu":
            return f"the prompt is on {prompt.input_ids.device}"
        reason = why_not_prompt(prompt) or RecurrentStepper.why_not(model, prompt)
        if not reason and encoder_states(prompt) is None:
            reason = "the prompt has no encoder states"
        return reason or describe().why_not()

    def start(self) -> torch.Tensor:
        prompt, description = self._prompt, self._description
        tensors = description.tensors()
        weights = self._weights = RecurrentWeights(tensors, decoder_copies(self._model, tensors))
        ids, encoded = prompt.input_ids, prompt.inputs["encoder_outputs"]
        states, mask = encoder_states(prompt), encoder_mask(prompt)
        if mask is not None and mask.shape != states.shape[:2]:
            raise ValueError(f"attention_mask: wanted shape {tuple(states.shape[:2])}, got {tuple(mask.shape)}")
        check_indices("decoder_input_ids", ids, tensors.token.shape[0], "config.vocab_size")
        self._logits = memory.empty((prompt.rows, weights.vocabulary), torch.float32, ids.device)
        if ids.shape[1] <= _SHORT:
            state = description.start(encoded)
        else:
            stepper = RecurrentStepper(self._model, prompt)
            logits = stepper.run_prompt()
            state = stepper.state
        values = states if description.attends else state.keys if description.maxout else None
        self._source = RecurrentSource(
            wide(state.keys if description.attends else None), wide(values),
            mask.contiguous() if mask is not None and description.attends else None,
            torch.arange(len(ids), dtype=torch.int32),
        )  # fmt: skip
        self._state = wide(state.hidden), wide(state.cell), wide(state.feed)
        if ids.shape[1] <= _SHORT:
            for column in ids.unbind(1):
                logits = self.step(column)
        if prompt.copies > 1:
            self.keep(torch.arange(prompt.rows) // prompt.copies)
        return logits

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = self._logits[: len(tokens)]
        self._state = self._weights.step(tokens, self._state, self._source, logits)
        return logits

    def choose(self, tokens: torch.Tensor, barred: torch.Tensor | None) -> torch.Tensor | None:
        if self._screen is None:
            weights = self._weights
            screen = head_screen(self._model, weights.tensors.head, weights.copies)
            self._screen = screen is not None and (screen, screen.bounds(weights.head_bias))
        if not self._screen:
            return None
        found, computed, self._state = self._weights.choose(tokens, self._state, self._source, *self._screen, barred)
        if computed > _USELESS:
            self._screen = False
        return found

    def reorder(self, index: torch.Tensor) -> None:
        hidden, cell, feed = self._state
        self._state = (
            hidden.index_select(1, index), None if cell is None else cell.index_select(1, index),
            None if feed is None else feed.index_select(0, index),
        )  # fmt: skip

    def keep(self, index: torch.Tensor) -> None:
        self.reorder(index)
        self._source.rows = self._source.rows.index_select(0, index)

    def key_values(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        raise NotImplementedError("a recurrent decoder has no keys and values")
