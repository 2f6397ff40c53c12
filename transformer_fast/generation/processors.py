"""HF's logits processors, without the copies of all scores that some of them make to change one column."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers.generation import logits_process as hf

__all__ = ["Rules", "bar", "in_place", "known_rules"]

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


class Rules(NamedTuple):
    """What processors come to that look at nothing but lengths.

    barred: of the length so far, the tokens that may not follow, int64 (n,), or None for none. forced: of the length so
    far, the tokens that alone may follow, all alike, or None where the logits decide.
    """

    barred: Bars
    forced: Bars


def known_rules(processors: Any) -> Rules | None:
    """The rules of processors that are exactly of the classes known here; None for any others, which have to see the
    scores."""
    if not processors:
        return Rules(_nothing, _nothing)
    if type(processors) is not hf.LogitsProcessorList or not all(type(p) in {**_BARS, **_FORCES} for p in processors):
        return None
    bars = [_BARS[type(p)](p) for p in processors if type(p) in _BARS]
    forces = [_FORCES[type(p)](p) for p in processors if type(p) in _FORCES]
    if any(type(p) in _BARS for p in processors[len(bars) :]):  # one that bars what has been forced
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
    """scores (rows, V), those of tokens made -inf in place; tokens that are none of V are nobody's."""
    if tokens is None:
        return scores
    tokens = tokens[(tokens >= 0) & (tokens < scores.shape[1])]
    return scores.index_fill_(1, tokens.to(scores.device), -math.inf)


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
