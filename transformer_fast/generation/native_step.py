"""Decoding on the CPU with one native call per token. ops.decoder_step has the arithmetic and the cache.

A model family describes its decoder by a StepDescription; this module is the same for all families. For what the native
step cannot run, why_not gives the reason, and the next stepper is tried.
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

_FEW = 512  # prompts of bfloat16 models with at most this many tokens in all use the weight copies
_SHORT = 8  # encoder-decoder prompts up to this length are run by the step, column by column


class _Loading(StepCache):
    """The cache for the model's forward on the prompt. It writes the keys and values of each layer directly to the
    DecoderCache, so that they are stored only once."""

    def __init__(self, cache: DecoderCache):
        super().__init__()
        self._decoder = cache

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        self._decoder.load(layer_idx, key_states, value_states)
        return key_states, value_states


class NativeStepper(DescribedStepper):
    """A Stepper on the CPU. Logits are float32; the next call overwrites them."""

    def __init__(self, model: Any, prompt: Prompt):
        super().__init__(model, prompt)
        self._cache: Any = None  # a DecoderCache, set by start

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
        """Run a short prompt by the step itself, column by column, with the encoder's states already loaded."""
        ids, padding = self._prompt.input_ids, self._description.position_padding
        batch, length = ids.shape
        cache.live = batch
        cache.sources[:batch] = torch.arange(batch)
        if self._positions is not None:
            cache.cover(self._last + self._description.position_offset)
        before = None if padding is None else (ids == padding).cumsum(1)  # positions do not count padding tokens
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
        """Run the prompt by the model's own forward, with GEMMs of many rows."""
        weights, stepper = cache.weights, ModelStepper(self._model, replace(self._prompt, copies=1, max_length=0))
        # For many rows torch's bfloat16 products are faster.
        few = weights.tensors.token.dtype == torch.float32 or self._prompt.input_ids.numel() <= _FEW
        with reading_copies(weights.by_weight if few else {}):
            return stepper.run_prompt(_Loading(cache))

    def _load_encoder(self, cache: DecoderCache, states: torch.Tensor) -> None:
        """Compute the cross-attention keys and values of the encoder's states and load them into the cache."""
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
