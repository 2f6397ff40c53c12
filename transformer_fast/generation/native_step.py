"""Decoding on the CPU by one native call per token: see ops.decoder_step for the arithmetic and the cache.

A family says what its decoder is made of by a StepDescription; everything else here is the same for all of them. What
the native step cannot serve has a reason (why_not) and goes to the next stepper.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..layers.projection import linear, projections, reading_copies
from ..ops.decoder_step import DecoderCache, DecoderWeights
from .cache import StepCache
from .decoder_state import decoder_state
from .described_step import DescribedStepper
from .model_step import ModelStepper
from .prompts import encoder_states, kept_columns
from .step_description import StepDescription
from .stepper import Prompt
from .weights import decoder_copies

__all__ = ["NativeStepper"]

_FEW = 512  # tokens of prompts
_SHORT = 8  # prompts of an encoder-decoder up to here go through the step, column by column


class _Loading(StepCache):
    """What a model's forward takes for its cache while it runs the prompt: each layer's keys and values are copied to
    where the steps want them as they come, and so kept once."""

    def __init__(self, cache: DecoderCache):
        super().__init__()
        self._decoder = cache

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        self._decoder.load(layer_idx, key_states, value_states)
        return key_states, value_states


class NativeStepper(DescribedStepper):
    """A Stepper on the CPU. Logits are float32 and the caller's until the next call."""

    def __init__(self, model: Any, prompt: Prompt):
        super().__init__(model, prompt)
        self._cache: Any = None  # a DecoderCache, from start on

    @classmethod
    def _why_not_on(cls, device: torch.device) -> str:
        return "" if device.type == "cpu" else f"the prompt is on {device}"

    @classmethod
    def _why_not_described(cls, description: StepDescription, prompt: Prompt) -> str:
        return description.why_not()

    # ---- Stepper ----
    def start(self) -> torch.Tensor:
        prompt, description = self._prompt, self._description
        tensors = description.tensors()
        weights = DecoderWeights(tensors, decoder_copies(self._model, tensors))
        length = prompt.input_ids.shape[1]
        states = encoder_states(prompt)
        shape = None if states is None else (states.shape[0], states.shape[1])
        kept = decoder_state(self._model).memory
        cache = self._cache = DecoderCache(weights, prompt.rows, self._room(length), shape, kept)
        mask = kept_columns(prompt)
        if states is not None:
            self._load_encoder(cache, states)
        self._begin_positions()
        if prompt.inputs.get("encoder_outputs") is not None and length <= _SHORT:
            logits = self._step_prompt(cache, mask)
        else:
            logits = self._run_prompt(cache)
        rows = self._prompt_of_row()
        cache.attend(rows, mask[rows])
        if cache.sources is not None:
            cache.sources.copy_(rows)
        cache.live = prompt.rows
        if self._positions is not None:
            self._positions = self._positions[rows].contiguous()
        return logits

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._append(self._cache.step, tokens)

    def choose(self, tokens: torch.Tensor, barred: torch.Tensor | None) -> torch.Tensor | None:
        if not self._cache.weights.can_choose:
            return None
        return self._append(self._cache.choose, tokens, barred)

    def rank(self, tokens: torch.Tensor, count: int, barred: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        return self._append(self._cache.rank, tokens, count, barred)

    def _append(self, step: Callable[..., Any], tokens: torch.Tensor, *more: Any) -> Any:
        cache, positions = self._cache, self._positions
        if positions is None:
            return step(tokens, None, *more)
        self._check_position()
        cache.cover(self._last + self._description.position_offset + 1)
        found = step(tokens, self._description.positions(tokens, positions), *more)
        positions += 1
        self._last += 1
        return found

    def reorder(self, index: torch.Tensor) -> None:
        self._cache.reorder(index)

    def keep(self, index: torch.Tensor) -> None:
        self._cache.reorder(index)
        if self._positions is not None:
            self._positions = self._positions[index]

    def key_values(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return self._cache.gather()

    # ---- the prompt ----
    def _step_prompt(self, cache: DecoderCache, mask: torch.Tensor) -> torch.Tensor:
        """A short prompt through the step itself, column by column, with the encoder's states loaded."""
        ids, padding = self._prompt.input_ids, self._description.position_padding
        batch, length = ids.shape
        cache.live = batch
        cache.sources[:batch] = torch.arange(batch)
        if self._positions is not None:
            cache.cover(self._last + self._description.position_offset)
        before = None if padding is None else (ids == padding).cumsum(1)  # the others are counted without it
        for column in range(length):
            positions = None
            if self._positions is not None:
                positions = self._positions - (length - column)
                if before is not None:
                    positions = self._description.positions(ids[:, column], positions - before[:, column])
            logits = cache.step(ids[:, column], positions)
            cache.table[:batch, column].masked_fill_(~mask[:, column], -1)
        return logits

    def _run_prompt(self, cache: DecoderCache) -> torch.Tensor:
        """The prompt through the model's own forward, with GEMMs of many rows."""
        weights, stepper = cache.weights, ModelStepper(self._model, replace(self._prompt, copies=1, max_length=0))
        # Many rows are faster by torch's products in bfloat16.
        few = weights.tensors.token.dtype == torch.float32 or self._prompt.input_ids.numel() <= _FEW
        with reading_copies(weights.by_weight if few else {}):
            return stepper.run_prompt(_Loading(cache))

    def _load_encoder(self, cache: DecoderCache, states: torch.Tensor) -> None:
        """Keys and values of the encoder's states."""
        spec, (order, lengths) = self._description.spec, self._kept_encoder()
        if order is None:
            cache.cross_lengths.fill_(states.shape[1])
        else:
            cache.cross_lengths.copy_(lengths)
            states = states.take_along_dim(order[..., None], 1)
        for i, w in enumerate(self._description.layers):
            if w.cross_key_value is not None:
                pair = linear(w.cross_key_value, states).chunk(2, -1)
            else:
                pair = projections([w.cross_key, w.cross_value], states)
            cache.load_cross(i, *(t.unflatten(-1, (spec.num_heads, spec.head_dim)).transpose(1, 2) for t in pair))
