"""Recurrent decoding on the CPU with one native call per token. ops.recurrent_step has the arithmetic.

`model.recurrent_description()` returns a RecurrentDescription of the decoder. For what the native step cannot run,
why_not gives the reason, and RecurrentStepper calls the modules step by step instead.
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

_USELESS = 0.5  # if more than this fraction of the logits has to be computed, stop using the screen
_SHORT = 8  # prompts up to this length are run by the step, token by token


@dataclass
class RecurrentDescription:
    """A recurrent decoder: its modules, and the options that are not in the modules.

    roots: the module trees that the native step bypasses, so that hooks in them would not run. rnn: a GRU or LSTM in
        one
    direction. query, readout: linear layers or None. score_weight: the weight of additive scores, or None. attends: the
    context is computed by attention; else, with maxout, it is one state per source. start: a function of the encoder's
    output that returns the state before the first step, with hidden, cell, feed and keys. refused: why a native step
    must not be used; '' if it may.
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
        """'' if the native step computes the same as the modules, else the reason why not."""
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
            return "the GRU or LSTM is bidirectional or projects its states"
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
        """The current weights."""
        rnn = self.rnn
        names = ("weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if rnn.bias else ()))
        cells = [CellTensors(*(getattr(rnn, f"{name}_l{i}") for name in names)) for i in range(rnn.num_layers)]
        query, readout = (None if m is None else projection_of(m) for m in (self.query, self.readout))
        return RecurrentTensors(
            self.token.weight, cells, isinstance(rnn, nn.LSTM), projection_of(self.head), query, self.score_weight,
            readout, self.maxout,
        )  # fmt: skip


class NativeRecurrentStepper:
    """A Stepper for recurrent decoders on the CPU. Logits are float32; the next call overwrites them."""

    def __init__(self, model: Any, prompt: Prompt):
        self._model, self._prompt = model, prompt
        self._description: RecurrentDescription = model.recurrent_description()
        self._weights: Any = None  # a RecurrentWeights, set by start
        self._state: Any = None  # hidden, memory, feed of the rows
        self._source: Any = None  # a RecurrentSource
        self._logits: Any = None
        self._screen: Any = None  # a HeadScreen and its bounds; False if there is none

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
