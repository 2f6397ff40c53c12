"""HF's logits processors, without the copies of all scores that some of them make to change one column."""

import math
from collections.abc import Callable
from typing import Any

import torch
from transformers.generation import logits_process as hf

__all__ = ["barred_tokens", "in_place"]

Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Bars = Callable[[int], Any]  # of the length so far: tokens that may not follow, or None


def in_place(processors: Any) -> Any:
    """What HF's LogitsProcessorList computes, maybe into the scores it is given. Only processors that are exactly the
    classes known here are replaced; all others are called as they are, in their order."""
    if type(processors) is not hf.LogitsProcessorList or not any(type(p) in _BARS for p in processors):
        return processors
    chosen: list[Processor] = [_barring(_BARS[type(p)](p)) if type(p) in _BARS else p for p in processors]

    def run(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for process in chosen:
            scores = process(input_ids, scores)
        return scores

    return run


def barred_tokens(processors: Any) -> Callable[[int], torch.Tensor | None] | None:
    """A function of the length so far that gives the tokens, int64 (n,), which processors rule out, None for none of
    them; or None where processors do anything else, so that it takes all scores to know what they do."""
    if not processors:
        return lambda length: None
    if type(processors) is not hf.LogitsProcessorList or not all(type(p) in _BARS for p in processors):
        return None
    bars = [_BARS[type(p)](p) for p in processors]

    def run(length: int) -> torch.Tensor | None:
        found = [_as_tokens(tokens) for bar in bars if (tokens := bar(length)) is not None]
        return torch.cat(found) if found else None

    return run


def _as_tokens(tokens: Any) -> torch.Tensor:
    return torch.as_tensor(tokens, dtype=torch.int64).reshape(-1)


def _barring(bars: Bars) -> Processor:
    def process(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        tokens = bars(ids.shape[-1])
        return scores if tokens is None else scores.index_fill_(1, _as_tokens(tokens).to(scores.device), -math.inf)

    return process


def _min_length(p: Any) -> Bars:
    return lambda length: p.eos_token_id if length < p.min_length else None


def _min_new_tokens(p: Any) -> Bars:
    least = p.prompt_length_to_skip + p.min_new_tokens
    return lambda length: p.eos_token_id if length < least else None


_BARS: dict[type, Callable[[Any], Bars]] = {
    hf.MinLengthLogitsProcessor: _min_length,
    hf.MinNewTokensLengthLogitsProcessor: _min_new_tokens,
}
