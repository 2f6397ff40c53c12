"""Recurrent decoding by the model's modules, one token per row and call."""

from typing import Any

import torch

from .._transformers import CACHE_NAME
from .stepper import Prompt

__all__ = ["RecurrentStepper"]


class RecurrentStepper:
    """A Stepper for models with a method `recurrent_step(tokens, state, values, mask) -> logits`, which advances
    `state`. Their forward returns the final state as past_key_values, with a method select(index) that keeps some of
    its rows."""

    def __init__(self, model: Any, prompt: Prompt):
        self._model, self._prompt = model, prompt
        self.state: Any = None  # of the rows, set by start
        self._values: Any = None  # (rows, Sk, E), the encoder's states
        self._mask: torch.Tensor | None = None  # (rows, Sk)

    @staticmethod
    def why_not(model: Any, prompt: Prompt) -> str:
        if not hasattr(model, "recurrent_step"):
            return f"{type(model).__name__} is not recurrent"
        known = {"encoder_outputs", "attention_mask", "use_cache", "return_dict", "logits_to_keep", "cache_position"}
        odd = sorted(k for k, v in prompt.inputs.items() if v is not None and k not in known)
        return f"the prompt has {', '.join(odd)}" if odd else ""

    def start(self) -> torch.Tensor:
        prompt, logits = self._prompt, self.run_prompt()
        self._values, self._mask = prompt.inputs["encoder_outputs"][0], prompt.inputs.get("attention_mask")
        if prompt.copies > 1:
            self._select(torch.arange(prompt.rows, device=prompt.input_ids.device) // prompt.copies)
        return logits

    def run_prompt(self) -> torch.Tensor:
        """Run the prompts by the model's forward. Returns the next logits (B, V) and sets `state`, with B rows."""
        output = self._model(
            attention_mask=self._prompt.inputs.get("attention_mask"), decoder_input_ids=self._prompt.input_ids,
            encoder_outputs=self._prompt.inputs["encoder_outputs"], use_cache=True, logits_to_keep=1, return_dict=True,
        )  # fmt: skip
        self.state = getattr(output, CACHE_NAME)
        return output.logits[:, -1]

    def _select(self, index: torch.Tensor) -> None:
        self.state.select(index)
        self._values = self._values.index_select(0, index)
        self._mask = None if self._mask is None else self._mask.index_select(0, index)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._model.recurrent_step(tokens, self.state, self._values, self._mask)

    def reorder(self, index: torch.Tensor) -> None:
        self.state.reorder_cache(index)

    def keep(self, index: torch.Tensor) -> None:
        self._select(index)

    def key_values(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        raise NotImplementedError("a recurrent decoder has no keys and values")
