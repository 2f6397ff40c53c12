"""HF's logits processors, without the copies of all scores that some of them make to change one column."""

import math
from collections.abc import Callable
from typing import Any

import torch
from transformers.generation import logits_process as hf

__all__ = ["in_place"]

Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def in_place(processors: Any) -> Any:
    """What HF's LogitsProcessorList computes, maybe into the scores it is given. Only processors that are exactly the
    classes known here are replaced; all others are called as they are, in their order."""
    if type(processors) is not hf.LogitsProcessorList or not any(type(p) in _KNOWN for p in processors):
        return processors
    chosen: list[Processor] = [_KNOWN[type(p)](p) if type(p) in _KNOWN else p for p in processors]

    def run(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for process in chosen:
            scores = process(input_ids, scores)
        return scores

    return run


def _without(scores: torch.Tensor, tokens: Any) -> torch.Tensor:
    return scores.index_fill_(1, torch.as_tensor(tokens, device=scores.device).reshape(-1), -math.inf)


def _min_length(p: Any) -> Processor:
    return lambda ids, scores: _without(scores, p.eos_token_id) if ids.shape[-1] < p.min_length else scores


def _min_new_tokens(p: Any) -> Processor:
    least = p.prompt_length_to_skip + p.min_new_tokens
    return lambda ids, scores: _without(scores, p.eos_token_id) if ids.shape[-1] < least else scores


_KNOWN: dict[type, Callable[[Any], Processor]] = {
    hf.MinLengthLogitsProcessor: _min_length,
    hf.MinNewTokensLengthLogitsProcessor: _min_new_tokens,
}
