"""The common part of the steppers that compute a step from a StepDescription, without the model's forward."""

from typing import Any

import torch

from .prompts import encoder_mask, encoder_states, kept_first, last_positions, why_not_prompt
from .step_description import StepDescription
from .stepper import Prompt

__all__ = ["DescribedStepper"]


class DescribedStepper:
    """Base class for Steppers: which models and prompts can be decoded, and the positions of the next tokens."""

    growth = 512  # positions allocated beyond those in use; a longer answer is copied to a larger cache

    def __init__(self, model: Any, prompt: Prompt):
        self._model, self._prompt = model, prompt
        self._description: StepDescription = model.step_description()
        # The row of the position table for the next token, first per prompt, later per row.
        self._positions: torch.Tensor | None = None
        self._last = 0  # the largest position of the next tokens

    @classmethod
    def why_not(cls, model: Any, prompt: Prompt) -> str:
        describe = getattr(model, "step_description", None)
        if describe is None:
            return f"{type(model).__name__} does not describe its decoding step"
        if reason := cls._why_not_on(prompt.input_ids.device) or why_not_prompt(prompt):
            return reason
        description, states = describe(), encoder_states(prompt)
        if description.has_cross_attention and states is None:
            return "the prompt has no encoder states"
        if states is not None and not description.has_cross_attention:
            return "the decoder has no cross-attention"
        return cls._why_not_described(description, prompt)

    @classmethod
    def _why_not_on(cls, device: torch.device) -> str:
        """'' if prompts on this device can be decoded, else the reason why not."""
        raise NotImplementedError

    @classmethod
    def _why_not_described(cls, description: StepDescription, prompt: Prompt) -> str:
        """'' if the step computes the same as the modules, else the reason why not."""
        raise NotImplementedError

    def _prompt_of_row(self) -> torch.Tensor:
        """(rows,): the prompt that each row continues."""
        prompt = self._prompt
        return torch.arange(prompt.rows, device=prompt.input_ids.device) // prompt.copies

    def _room(self, length: int) -> int:
        """The number of positions to allocate for prompts of `length`."""
        return length + min(max(self._prompt.max_length - length, 1), self.growth)

    def _begin_positions(self) -> None:
        description = self._description
        if description.position is None and description.rotary is None:
            return
        positions = last_positions(self._prompt)
        self._last = int(positions.max())
        self._positions = positions + description.position_offset

    def _check_position(self) -> None:
        limit = self._description.most_positions
        if limit is not None and self._last >= limit:
            raise ValueError(
                f"max_new_tokens: position {self._last} is past the model's {limit} positions; ask for fewer tokens"
            )

    def _kept_encoder(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """An order (B, Se) of each prompt's encoder states with those that its mask keeps first, and their numbers
        (B,). Cross-attention does not depend on the order. (None, None) if all are kept."""
        mask = encoder_mask(self._prompt)
        return (None, None) if mask is None else kept_first(mask)
