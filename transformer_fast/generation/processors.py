"""HF's logits processors in place: some of them copy all scores only to change one column."""

import math
from collections.abc import Callable
from typing import Any

import torch
from transformers.generation import logits_process as hf

__all__ = ["barred_tokens", "in_place"]

Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Bars = Callable[[int], Any]  # length so far -> the tokens that are excluded now, or None


def in_place(processors: Any) -> Any:
    """A function with the result of HF's LogitsProcessorList, which may write to the scores it gets. Only processors of
    exactly the classes in _BARS are replaced; all others are called unchanged, in their order."""
    if type(processors) is not hf.LogitsProcessorList or not any(type(p) in _BARS for p in processors):
        return processors
    chosen: list[Processor] = [_barring(_BARS[type(p)](p)) if type(p) in _BARS else p for p in processors]

    def run(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for process in chosen:
            scores = process(input_ids, scores)
        return scores

    return run


def barred_tokens(processors: Any) -> Callable[[int], torch.Tensor | None] | None:
    """A function of the length so far that returns the tokens, int64 (n,), which the processors exclude, or None for no
    tokens. The result is None if a processor does anything else, because that needs all scores."""
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
