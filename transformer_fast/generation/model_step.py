"""Decoding by the model's own forward, one token per row and call, with an in-place cache. For all models and
devices."""

from typing import Any

import torch
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from .._transformers import cached
from .cache import StepCache, shared_cross_cache
from .stepper import Prompt

__all__ = ["ModelStepper"]

# Inputs of the prompt that later steps do not get, and inputs that are made anew in each step.
_PROMPT_ONLY = ("inputs_embeds", "labels", "logits_to_keep", "decoder_inputs_embeds")
_PER_STEP = ("attention_mask", "position_ids", "token_type_ids", "decoder_attention_mask", "decoder_position_ids")


class ModelStepper:
    """A Stepper that calls the model. Prompts run once and not once per row. The rows of a prompt share the encoder's
    keys and values."""

    def __init__(self, model: Any, prompt: Prompt):
        self.model, self.prompt = model, prompt
        self.rows = prompt.rows
        self.encoder_decoder = bool(model.config.is_encoder_decoder)
        self.cache = StepCache()
        crossed = self.encoder_decoder or prompt.inputs.get("encoder_hidden_states") is not None
        self._cross = EncoderDecoderCache(self.cache, DynamicCache()) if crossed else None
        # Models outside this package need one row of encoder keys per decoder row.
        self._shared = prompt.copies if getattr(model, "_shares_encoder_keys", False) else 1

    @staticmethod
    def why_not(model: Any, prompt: Prompt) -> str:
        return "it is recurrent" if hasattr(model, "recurrent_step") else ""

    def start(self) -> torch.Tensor:
        logits = self.run_prompt(self.cache)
        self.cache.open(self.prompt.copies, self.prompt.max_length)
        self._prepare()
        return logits

    def run_prompt(self, cache: StepCache) -> torch.Tensor:
        """Run the prompts, store their keys and values in `cache`, and return the logits after their last columns."""
        model, prompt = self.model, self.prompt
        if self._cross is not None:
            self._cross.self_attention_cache = cache
        inputs = {**prompt.inputs, **cached(cache if self._cross is None else self._cross), "use_cache": True}
        inputs = model.prepare_inputs_for_generation(prompt.input_ids, is_first_iteration=True, **inputs)
        return model(**inputs, return_dict=True).logits[:, -1]

    def _prepare(self) -> None:
        """Prepare the inputs of the later steps: one row each, except encoder inputs that rows share."""
        prompt, copies = self.prompt, self.prompt.copies
        prefix = "decoder_" if self.encoder_decoder else ""
        self._ids, self._position_name, self._mask_name = (
            prefix + name for name in ("input_ids", "position_ids", "attention_mask")
        )
        mask, positions = prompt.inputs.get(self._mask_name), prompt.inputs.get(self._position_name)
        types = prompt.inputs.get("token_type_ids")
        length = self.cache.length
        self._mask = None
        if mask is not None and not bool((mask != 0).all()):
            self._mask = torch.nn.functional.pad(mask, (0, length - mask.shape[1]), value=1)
            self._mask = self._per_row(self._mask)
        self._position = None
        columns = getattr(self.model, "_positions_are_columns", True)  # the model's default without position_ids
        if positions is not None and (
            not columns or self._mask is not None or not bool((positions[:, -1:] == length - 1).all())
        ):  # fmt: skip
            self._position = self._per_row(positions[:, -1:].expand(len(prompt.input_ids), 1)) + 1
        self._type = None if types is None else self._per_row(types[:, -1:])
        cache = self.cache if self._cross is None else self._cross
        self._fixed: dict[str, Any] = {**cached(cache), "use_cache": True, "return_dict": True}
        taken = (*_PROMPT_ONLY, *(n for n in _PER_STEP if not self.encoder_decoder or n != "attention_mask"))
        for name, value in prompt.inputs.items():
            if name not in taken and name not in self._fixed and value is not None:
                self._fixed[name] = value
        if self._cross is not None and copies != self._shared:
            self._spread(torch.arange(self.rows, device=prompt.input_ids.device) // copies)

    def _per_row(self, t: torch.Tensor) -> torch.Tensor:
        return t if self.prompt.copies == 1 else t.repeat_interleave(self.prompt.copies, 0)

    def _spread(self, index: torch.Tensor) -> None:
        """Give row r the encoder inputs of row index[r]."""
        assert self._cross is not None
        shared_cross_cache(self._cross, index)
        for name in ("encoder_hidden_states", "encoder_attention_mask", "attention_mask", "encoder_outputs"):
            value = self._fixed.get(name)
            if isinstance(value, torch.Tensor):
                self._fixed[name] = value.index_select(0, index)
            elif value is not None:
                states = value[0].index_select(0, index)
                self._fixed[name] = type(value)(last_hidden_state=states) if hasattr(value, "keys") else (states,)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        inputs = dict(self._fixed)
        inputs[self._ids] = tokens[:, None]
        if self._mask is not None:
            self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=1)
            inputs[self._mask_name] = self._mask
        if self._position is not None:
            inputs[self._position_name] = self._position
            self._position = self._position + 1
        if self._type is not None:
            inputs["token_type_ids"] = self._type
        logits = self.model(**inputs).logits[:, -1]
        self.cache.advance()
        return logits

    def reorder(self, index: torch.Tensor) -> None:
        self.cache.reorder(index)

    def keep(self, index: torch.Tensor) -> None:
        self.cache.keep(index)
        self.rows = len(index)
        self._mask, self._position, self._type = (
            None if t is None else t.index_select(0, index) for t in (self._mask, self._position, self._type)
        )
        if self._cross is None:
            return
        prompts = index.view(-1, self._shared) // self._shared if len(index) % self._shared == 0 else None
        if prompts is not None and bool((prompts == prompts[:, :1]).all()):
            self._spread(prompts[:, 0])
        else:
            self._spread(index // self._shared)
            self._shared = 1

    def key_values(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return self.cache.pairs()
