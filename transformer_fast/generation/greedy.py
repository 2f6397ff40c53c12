"""Greedy decoding on the CPU where only lengths and end tokens decide: the loop of sample without tensor arithmetic.

A step of a small model takes one or two milliseconds, as long as some fifty tensor operations.
"""

import math
from typing import Any, NamedTuple

import torch
from transformers.generation import stopping_criteria as hf

from .processors import Rules, bar
from .rows import LiveRows
from .stepper import Stepper

__all__ = ["Ends", "known_ends", "greedy"]


class Ends(NamedTuple):
    """When rows end: at `most` tokens in all, prompt included, or after one of `tokens`."""

    most: int
    tokens: frozenset[int]


def known_ends(criteria: Any) -> Ends | None:
    """What stopping criteria say, or None if there are any but exactly those known here, or no greatest length."""
    if type(criteria) is not hf.StoppingCriteriaList:
        return None
    most: float = math.inf
    tokens: set[int] = set()
    for c in criteria:
        if type(c) is hf.MaxLengthCriteria:
            longest = c.max_position_embeddings
            if longest is not None and longest < c.max_length:  # it warns on the way
                return None
            most = min(most, c.max_length)
        elif type(c) is hf.EosTokenCriteria:
            tokens |= set(torch.as_tensor(c.eos_token_id).reshape(-1).tolist())
        else:
            return None
    return None if math.isinf(most) else Ends(int(most), frozenset(tokens))


def greedy(
    stepper: Stepper,
    input_ids: torch.Tensor,
    copies: int,
    rules: Rules,
    ends: Ends,
    pad: Any,
    streamer: Any,
) -> torch.Tensor:
    """What sample returns. pad: () int64, or None without end tokens."""
    rows, length = input_ids.shape
    ids = input_ids.new_empty(rows, max(ends.most, length + 1))
    ids[:, :length] = input_ids
    live = LiveRows(stepper, rows, fixed=not ends.tokens)
    going, filler = [True] * rows, None if pad is None else int(pad)
    logits = stepper.start()
    logits = logits if copies == 1 else logits.repeat_interleave(copies, 0)
    tokens = _largest(logits, rules, length)
    while True:
        found = tokens.tolist()
        if not all(going):
            found = [token if goes else filler for token, goes in zip(found, going)]
            tokens = torch.tensor(found)
        ids[:, length] = tokens
        length += 1
        if streamer is not None:
            streamer.put(tokens)
        if length >= ends.most:
            break
        if not ends.tokens.isdisjoint(found):
            going = [goes and token not in ends.tokens for token, goes in zip(found, going)]
            if not any(going):
                break
            live.drop(~torch.tensor(going))
        forced = rules.forced(length)
        if forced is not None and length + 1 >= ends.most:  # nobody asks what would follow
            tokens = forced.min().expand(rows)
            continue
        chosen = None if forced is not None else live.choose(tokens, rules.barred(length))
        tokens = _largest(live.step(tokens), rules, length) if chosen is None else chosen
    if streamer is not None:
        streamer.end()
    return ids[:, :length].contiguous()


def _largest(logits: torch.Tensor, rules: Rules, length: int) -> torch.Tensor:
    """The token of each row that rules leave the largest, the first of them."""
    forced = rules.forced(length)
    if forced is not None:
        return forced.min().expand(len(logits))
    return bar(logits, rules.barred(length)).argmax(-1)
