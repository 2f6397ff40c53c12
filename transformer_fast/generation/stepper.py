"""How the engine and a decoder talk: a Stepper runs the prompt once and then one token per row and call."""

import importlib
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

__all__ = ["Prompt", "Stepper", "choose_stepper"]


@dataclass
class Prompt:
    """What generation begins with, one entry per prompt.

    input_ids: (B, S) int64, the decoder's own; S = 0 where inputs_embeds alone are given.
    copies: how many rows continue each prompt (beams or samples): row r continues prompt r // copies.
    max_length: the most positions a row will hold, prompt included: so large a cache is enough.
    inputs: the model's other arguments under HF's names, (B, ...) each: attention_mask (None when nothing is padding),
        position_ids, token_type_ids, inputs_embeds, encoder_outputs, encoder_hidden_states, encoder_attention_mask...;
        in an encoder-decoder attention_mask is the encoder's and decoder_attention_mask the decoder's. The encoder has
        run: encoder_outputs.last_hidden_state is (B, Se, E).
    """

    input_ids: torch.Tensor
    copies: int = 1
    max_length: int = 0
    inputs: dict[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return self.input_ids.shape[0] * self.copies


class Stepper(Protocol):
    """Decodes rows of sequences one token at a time. Made for one prompt, used under torch.no_grad.

    Logits are float32 or the model's dtype, (rows, V), and stay valid until the next call; the caller may write to
    them. Positions as in HF: a row's next token has the position of its last prompt column plus one (position_ids when
    given, else the number of columns), attends to every column that the prompt's mask keeps and to all generated ones,
    and repeats the last token_type_id.
    Raises ValueError when a row would pass the model's positions.

    A stepper that can tell the largest logit of a row without all of them has choose(tokens, barred) -> (rows,) int64
    or None too: as step, but of each row the first of the largest logits, tokens in `barred` (int64, or None) left out;
    None, before anything is done, where step has to be asked.
    One that can rank them has rank(tokens, count, barred) -> float32 and int64 (rows, count): the largest
    log-probabilities of each row, largest first, and their tokens; those in `barred` have a log-probability of -inf.
    """

    def __init__(self, model: Any, prompt: Prompt): ...

    @staticmethod
    def why_not(model: Any, prompt: Prompt) -> str:
        """'' when this stepper can decode `prompt`, else the reason why not."""
        ...

    def start(self) -> torch.Tensor:
        """Run the prompts: the logits that follow their last column, (B, V), one entry per prompt and not per row."""
        ...

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append tokens (rows,) int64 and return the logits that follow, (rows, V)."""
        ...

    def reorder(self, index: torch.Tensor) -> None:
        """Row r goes on from what row index[r] holds; index: (rows,) int64, within the rows of one prompt."""
        ...

    def keep(self, index: torch.Tensor) -> None:
        """Go on with fewer rows: row r of the new ones is row index[r]; index: (fewer,) int64, no row twice and
        index[r] == r or index[r] >= len(index): rows from the end fill the holes, so that little has to move."""
        ...

    def key_values(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The self-attention cache, layer by layer: keys and values (rows, H, length, D), for callers that go on."""
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
