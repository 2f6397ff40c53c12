"""Beam search as HF scores it, around a Stepper: the beams' caches are reordered by index."""

from typing import Any

import torch

from .rows import LiveRows
from .sample import Record
from .stepper import Stepper

__all__ = ["beam_search"]

_NEVER = -1.0e9  # HF's score of what must not be chosen
_BLOCK = 256


def top_values(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """torch.topk along the last dimension of (rows, n), sorted. In long rows the k best blocks are found by their
    maxima first, one pass at the speed of memory; what is not in one of them is not among the k best."""
    rows, n = x.shape
    blocks = n // _BLOCK
    if x.device.type != "cpu" or blocks < 4 * k or not x.is_contiguous():
        return torch.topk(x, k)
    whole = x[:, : blocks * _BLOCK].unflatten(1, (blocks, _BLOCK))
    chosen = torch.topk(whole.amax(-1), k)[1]
    values = whole.gather(1, chosen[..., None].expand(-1, -1, _BLOCK)).flatten(1)
    columns = (chosen[..., None] * _BLOCK + torch.arange(_BLOCK)).flatten(1)
    if blocks * _BLOCK < n:
        values = torch.cat((values, x[:, blocks * _BLOCK :]), 1)
        columns = torch.cat((columns, torch.arange(blocks * _BLOCK, n).expand(rows, -1)), 1)
    best, where = torch.topk(values, k)
    return best, columns.gather(1, where)


def _continuations(log_probs, running, k: int, do_sample: bool):
    """The k best (or drawn) continuations of each prompt: scores, beams and tokens, (B, k) each.

    log_probs: (B * K, V); running: (B, K), the scores so far.
    """
    batch, beams = running.shape
    vocabulary = log_probs.shape[-1]
    if do_sample or vocabulary < 2 * k:
        total = (log_probs.view(batch, beams, -1) + running[:, :, None]).view(batch, -1)
        if do_sample:
            index = torch.multinomial(torch.softmax(total, -1), num_samples=k)
            return total.gather(1, index), index // vocabulary, index % vocabulary
        scores, index = torch.topk(total, k)
        return scores, index // vocabulary, index % vocabulary
    # The k best of a prompt are among the k best of its beams.
    best, tokens = top_values(log_probs, k)
    total = (best.view(batch, beams, k) + running[:, :, None]).view(batch, -1)
    scores, index = torch.topk(total, k)
    return scores, index // k, tokens.view(batch, -1).gather(1, index)


def _select(t: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """t[b, index[b]] for (B, n, L) or (B, n)."""
    return t.gather(1, index) if t.dim() == 2 else t.gather(1, index[..., None].expand(-1, -1, t.shape[2]))


def beam_search(
    stepper: Stepper, input_ids: torch.Tensor, processors: Any, criteria: Any, config: Any, record: Record
) -> dict[str, torch.Tensor]:
    """sequences (B * n, longest), sequences_scores (B * n,) and beam_indices (B * n, generated), as HF returns them.

    input_ids: (B * K, S), each prompt K = config.num_beams times. Scores are summed log-probabilities over
    length ** length_penalty. Source: HF's GenerationMixin._beam_search, whose rules for ending these are.
    """
    pad, eos = config._pad_token_tensor, config._eos_token_tensor
    beams, penalty, early, max_length = (
        config.num_beams,
        config.length_penalty,
        config.early_stopping,
        config.max_length,
    )
    device = input_ids.device
    batch, prompt = len(input_ids) // beams, input_ids.shape[1]
    k = max(2, 1 + (0 if eos is None else len(eos))) * beams
    fill = int((pad or eos[0]) if eos is not None else -1)
    running_ids = torch.full((batch, beams, max_length), fill, dtype=torch.int64, device=device)
    running_ids[:, :, :prompt] = input_ids.view(batch, beams, prompt)
    ids = running_ids.clone()
    running = torch.full((batch, beams), _NEVER, device=device)
    running[:, 0] = 0.0  # all beams begin alike: only the first counts
    scores = torch.full((batch, beams), _NEVER, device=device)
    ended = torch.zeros((batch, beams), dtype=torch.bool, device=device)
    improvable = torch.ones((batch, 1), dtype=torch.bool, device=device)
    running_from = torch.full((batch, beams, max_length - prompt), -1, dtype=torch.int32, device=device)
    came_from = running_from.clone()
    first = torch.arange(k, device=device) < beams  # only the best K continuations may end
    offset = (torch.arange(batch, device=device) * beams)[:, None]
    live = LiveRows(stepper, batch * beams, fixed=record.active or config.do_sample)
    logits = stepper.start().repeat_interleave(beams, 0)
    length = prompt
    while True:
        flat_ids = running_ids[:, :, :length].flatten(0, 1)
        logits = logits.to(torch.float32)
        log_probs = processors(flat_ids, torch.log_softmax(logits, -1))
        if record.active:
            record.add(logits.clone(), log_probs.clone())
        top, beam, token = _continuations(log_probs, running, k, config.do_sample)

        top_ids = _select(running_ids, beam)
        top_ids[:, :, length] = token
        top_from = _select(running_from, beam)
        top_from[:, :, length - prompt] = beam + offset
        hit = criteria(top_ids[:, :, : length + 1].flatten(0, 1), record.scores).view(batch, k)

        going = top + hit.to(torch.float32) * _NEVER
        running, chosen = torch.topk(going, beams)
        running_ids, running_from = _select(top_ids, chosen), _select(top_from, chosen)

        if bool((hit & first).any()):  # else nothing could join the ended ones
            done = top / ((length + 1 - prompt) ** penalty)
            blocked = ~improvable | (ended.all(-1, keepdim=True) & (early is True))
            done = done + blocked.to(torch.float32) * _NEVER + (~(hit & first)).to(torch.float32) * _NEVER
            scores, chosen = torch.topk(torch.cat((scores, done), 1), beams)
            ids = _select(torch.cat((ids, top_ids), 1), chosen)
            came_from = _select(torch.cat((came_from, top_from), 1), chosen)
            ended = torch.cat((ended, hit & first), 1).gather(1, chosen)

        length += 1
        best_length = max_length - prompt if early == "never" and penalty > 0.0 else length - prompt
        possible = running[:, :1] / (best_length**penalty)
        worst = torch.where(ended, scores.amin(1, keepdim=True), _NEVER)
        improvable = improvable & (possible > worst).any(-1, keepdim=True)
        over = ~improvable.squeeze(1) | ended.all(-1) if early is True else ~improvable.squeeze(1)
        go_on = improvable.any() & ~(ended.all() & (early is True)) & ~hit.all()
        live.reorder(running_from[:, :, length - 1 - prompt].flatten().long())
        if not bool(go_on):
            break
        live.drop(over.repeat_interleave(beams))
        logits = live.step(running_ids[:, :, length - 1].flatten())

    n = config.num_return_sequences
    came_from = came_from[:, :n].flatten(0, 1)
    generated = int((came_from >= 0).sum(1).max())
    return {
        "sequences": ids[:, :n].flatten(0, 1)[:, : prompt + generated],
        "sequences_scores": scores[:, :n].flatten(),
        "beam_indices": came_from[:, :generated],
    }
