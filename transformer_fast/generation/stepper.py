"""The interface between the engine and a decoder: a Stepper runs the prompts once, then one token per row and call."""

import importlib
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

__all__ = ["Prompt", "Stepper", "choose_stepper"]


@dataclass
class Prompt:
    """The input of generation, one entry per prompt.

    input_ids: (B, S) int64, the decoder's; S = 0 if only inputs_embeds are given.
    copies: how many rows continue each prompt (beams or samples). Row r continues prompt r // copies.
    max_length: the maximum number of positions per row, prompt included; a cache of this size is enough.
    inputs: the model's other arguments under HF's names, (B, ...) each: attention_mask (None if there is no padding),
        position_ids, token_type_ids, inputs_embeds, encoder_outputs, encoder_hidden_states, encoder_attention_mask, ...
        In an encoder-decoder attention_mask is the encoder's and decoder_attention_mask the decoder's; the encoder has
        already run, and encoder_outputs.last_hidden_state is (B, Se, E).
    """

    input_ids: torch.Tensor
    copies: int = 1
    max_length: int = 0
    inputs: dict[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return self.input_ids.shape[0] * self.copies


class Stepper(Protocol):
    """Decodes rows of sequences one token at a time. It is made for one Prompt and used under torch.no_grad.

    Logits are (rows, V) in float32 or the model's dtype. They stay valid until the next call, and the caller may write
    to them. As in HF, a row's next token has the position of its last prompt column plus one (from position_ids if
    given, else the number of columns), attends to every column that the prompt's mask keeps and to all generated
    tokens, and repeats the last token_type_id. Raises ValueError if a row would exceed the model's positions.

    A stepper may also have choose(tokens, barred) -> (rows,) int64 or None. It is like step, but returns the token with
    the largest logit per row (the first of equal ones), except for tokens in `barred` (int64, or None). It returns
    None, and does nothing, if the caller must use step instead.
    It may also have rank(tokens, count, barred) -> (float32, int64), (rows, count) each. It is like step, but returns
    the largest log-probabilities per row, largest first, and their tokens. Tokens in `barred` have -inf.
    """

    def __init__(self, model: Any, prompt: Prompt): ...

    @staticmethod
    def why_not(model: Any, prompt: Prompt) -> str:
        """'' if this stepper can decode `prompt`, else the reason why not."""
        ...

    def start(self) -> torch.Tensor:
        """Run the prompts. Returns the logits after their last column, (B, V): one entry per prompt, not per row."""
        ...

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append tokens (rows,) int64 and return the next logits (rows, V)."""
        ...

    def reorder(self, index: torch.Tensor) -> None:
        """Let row r continue from the state of row index[r]. index: (rows,) int64, within the rows of one prompt."""
        ...

    def keep(self, index: torch.Tensor) -> None:
        """Continue with fewer rows: the new row r is row index[r]. index: (fewer,) int64, without duplicates, and with
        index[r] == r or index[r] >= len(index): rows from the end fill the gaps, so that few rows move."""
        ...

    def key_values(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The self-attention cache per layer: keys and values (rows, H, length, D), for the output of generate."""
        ...


# (module, class): the first that can decode a prompt is used.
_STEPPERS = (
    ("native_recurrent_step", "NativeRecurrentStepper"), ("recurrent_step", "RecurrentStepper"),
    ("native_step", "NativeStepper"), ("graph_step", "GraphStepper"),
    ("model_step", "ModelStepper"),
)  # fmt: skip


def choose_stepper(model: Any, prompt: Prompt) -> Stepper | None:
    """The fastest stepper that can decode `prompt`, or None."""
    for module, name in _STEPPERS:
        kind = getattr(importlib.import_module(f".{module}", __package__), name)
        if not kind.why_not(model, prompt):
            return kind(model, prompt)
    return None
