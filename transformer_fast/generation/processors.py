"""HF's logits processors in place: some of them copy all scores only to change one column."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers.generation import logits_process as hf

__all__ = ["Rules", "bar", "in_place", "known_rules"]

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


class Rules(NamedTuple):
    """The effect of processors that depend on nothing but the length.

    barred: length so far -> the tokens that are excluded now, int64 (n,), or None for no tokens. forced: length so far
    -> the only tokens that are allowed now, with equal scores, or None if the logits decide.
    """

    barred: Bars
    forced: Bars


def known_rules(processors: Any) -> Rules | None:
    """The rules of processors that are exactly of the classes known here. The result is None if there is any other
    processor, because that needs all scores."""
    if not processors:
        return Rules(_nothing, _nothing)
    if type(processors) is not hf.LogitsProcessorList or not all(type(p) in {**_BARS, **_FORCES} for p in processors):
        return None
    bars = [_BARS[type(p)](p) for p in processors if type(p) in _BARS]
    forces = [_FORCES[type(p)](p) for p in processors if type(p) in _FORCES]
    if any(type(p) in _BARS for p in processors[len(bars) :]):  # it would exclude what is forced
        return None
    return Rules(_all_of(bars), _last_of(forces))


def _nothing(length: int) -> None:
    return None


def _all_of(bars: list[Bars]) -> Bars:
    def run(length: int) -> torch.Tensor | None:
        found = [_as_tokens(tokens) for bar in bars if (tokens := bar(length)) is not None]
        return torch.cat(found) if found else None

    return run


def _last_of(forces: list[Bars]) -> Bars:
    def run(length: int) -> torch.Tensor | None:
        found = [_as_tokens(tokens) for force in forces if (tokens := force(length)) is not None]
        return found[-1] if found else None

    return run


def bar(scores: torch.Tensor, tokens: torch.Tensor | None) -> torch.Tensor:
    """Set the scores (rows, V) of tokens to -inf, in place. Tokens outside [0, V) are ignored, as in HF."""
    if tokens is None:
        return scores
    if scores.device.type == "cpu":
        tokens = tokens[(tokens >= 0) & (tokens < scores.shape[1])]
        return scores.index_fill_(1, tokens, -math.inf)
    every = torch.arange(scores.shape[1], device=scores.device)  # without a wait for the device
    return scores.masked_fill_(torch.isin(every, tokens.to(scores.device)), -math.inf)


def _as_tokens(tokens: Any) -> torch.Tensor:
    return torch.as_tensor(tokens, dtype=torch.int64).reshape(-1)


def _barring(bars: Bars) -> Processor:
    def process(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        tokens = bars(ids.shape[-1])
        return scores if tokens is None else bar(scores, _as_tokens(tokens))

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


def _forced_end(p: Any) -> Bars:
    return lambda length: p.eos_token_id if length == p.max_length - 1 else None


def _forced_beginning(p: Any) -> Bars:
    return lambda length: p.bos_token_id if length == 1 else None


_FORCES: dict[type, Callable[[Any], Bars]] = {
    hf.ForcedBOSTokenLogitsProcessor: _forced_beginning,
    hf.ForcedEOSTokenLogitsProcessor: _forced_end,
}
