"""Greedy decoding and sampling on a Stepper, with HF's processors, criteria and draws."""

from collections.abc import Sequence
from typing import Any

import torch

from .._transformers import cached, pad_token
from .cache import as_hugging_face
from .greedy import greedy, known_ends
from .processors import in_place, known_rules
from .rows import LiveRows
from .stepper import Stepper

__all__ = ["Record", "sample"]


class Record:
    """The per-step tensors of the output with return_dict_in_generate."""

    def __init__(self, config: Any):
        wanted = config.return_dict_in_generate
        self.scores: tuple | None = () if wanted and config.output_scores else None
        self.logits: tuple | None = () if wanted and config.output_logits else None
        self.active = wanted

    def add(self, logits: torch.Tensor | None, scores: torch.Tensor) -> None:
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (logits,)

    def fields(self, stepper: Stepper, encoder_decoder: bool) -> dict[str, Any]:
        """The fields that HF's output classes have in common."""
        cache = as_hugging_face(stepper.key_values(), encoder_decoder)
        return {"scores": self.scores, "logits": self.logits, **cached(cache)}


def draw(scores: torch.Tensor, generators: Sequence[torch.Generator] | None) -> torch.Tensor:
    """Sample one token per row from softmax(scores): with HF's draw, or for row r with generators[r]."""
    probabilities = torch.softmax(scores, -1)
    if generators is None:
        return torch.multinomial(probabilities, num_samples=1).squeeze(1)
    return torch.cat([torch.multinomial(p, 1, generator=g) for p, g in zip(probabilities, generators)])


def sample(
    stepper: Stepper,
    input_ids: torch.Tensor,
    copies: int,
    processors: Any,
    criteria: Any,
    config: Any,
    streamer: Any,
    generators: Sequence[torch.Generator] | None,
    record: Record,
) -> torch.Tensor:
    """Returns (rows, longest): input_ids (rows, S), followed by the generated tokens.

    Finished rows are filled with config's pad token. Processors and draws see the whole batch, however few rows are
    still computed, so that the draws equal HF's.
    """
    rules = None if config.do_sample or record.active else known_rules(processors)
    pad, known = pad_token(config), known_ends(criteria)
    if rules is not None and known is not None and input_ids.device.type == "cpu":
        return greedy(stepper, input_ids, copies, rules, known, pad, streamer)
    processors = in_place(processors)
    ends = any(hasattr(c, "eos_token_id") for c in criteria)
    plain = not processors and not config.do_sample and not record.active
    unfinished = torch.ones(len(input_ids), dtype=torch.long, device=input_ids.device)
    live = LiveRows(stepper, len(input_ids), fixed=record.active or not ends)
    logits = stepper.start()
    logits = logits if copies == 1 else logits.repeat_interleave(copies, 0)
    while True:
        if plain:
            tokens = logits.argmax(-1)
        else:
            logits = logits.to(torch.float32, copy=record.logits is not None)
            raw = logits.clone() if record.logits is not None else None
            scores = processors(input_ids, logits)
            record.add(raw, scores if scores is not logits or record.scores is None else scores.clone())
            tokens = draw(scores, generators) if config.do_sample else scores.argmax(-1)
        if ends:
            tokens = tokens * unfinished + pad * (1 - unfinished)
        input_ids = torch.cat((input_ids, tokens[:, None]), -1)
        if streamer is not None:
            streamer.put(tokens.cpu())
        unfinished = unfinished & ~criteria(input_ids, record.scores)
        if not bool(unfinished.any()):
            break
        if ends:
            live.drop(unfinished == 0)
        logits = live.step(tokens)
    if streamer is not None:
        streamer.end()
    return input_ids
