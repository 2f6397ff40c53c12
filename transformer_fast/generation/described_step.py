"""What the steppers share that compute a step themselves, from a StepDescription and by no forward of the model."""

from typing import Any

import torch

from .prompts import encoder_mask, encoder_states, kept_first, last_positions, why_not_prompt
from .step_description import StepDescription
from .stepper import Prompt

__all__ = ["DescribedStepper"]


class DescribedStepper:
    """Half a Stepper: which models and prompts are served, and where the next tokens lie."""

    growth = 512  # positions allocated beyond what is held: a longer answer moves to a larger cache

    def __init__(self, model: Any, prompt: Prompt):
        self._model, self._prompt = model, prompt
        self._description: StepDescription = model.step_description()
        self._positions: torch.Tensor | None = None  # the next token's row of the table, for each prompt, then each row
        self._last = 0  # the largest position of a next token

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
        """'' when prompts on this device are served."""
        raise NotImplementedError

    @classmethod
    def _why_not_described(cls, description: StepDescription, prompt: Prompt) -> str:
        """'' when the step computes what the modules would."""
        raise NotImplementedError

    def _prompt_of_row(self) -> torch.Tensor:
        """(rows,): the prompt that each row continues."""
        prompt = self._prompt
        return torch.arange(prompt.rows, device=prompt.input_ids.device) // prompt.copies

    def _room(self, length: int) -> int:
        """How many positions to allocate for prompts of `length`."""
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
        """(the columns of each prompt's encoder states, those that its mask keeps first, and how many it keeps):
        cross-attention knows no order. (None, None) where all are kept."""
        mask = encoder_mask(self._prompt)
        return (None, None) if mask is None else kept_first(mask)
