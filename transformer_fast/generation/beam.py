"""Beam search with HF's scoring, on a Stepper, whose caches are reordered by index."""

from typing import Any

import torch

from .._transformers import end_tokens, pad_token
from .processors import in_place, known_rules
from .rows import LiveRows
from .sample import Record
from .stepper import Stepper

__all__ = ["beam_search"]

_NEVER = -1.0e9  # HF's score for what must not be chosen
_BLOCK = 256


def top_values(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """torch.topk along the last dimension of (rows, n), sorted. For long rows it first finds the k blocks with the
    largest maxima, in one pass at memory speed. The k best values are all in these blocks."""
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
    """The k best (or sampled) continuations of each prompt: scores, beams and tokens, (B, k) each.

    log_probs: (B * K, V). running: (B, K), the scores so far.
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
    # The k best continuations of a prompt are among the k best of each of its beams.
    return _best_of_beams(*top_values(log_probs, k), running)


def _best_of_beams(best, tokens, running):
    """What _continuations returns, from the k best tokens of each beam: best, tokens (B * K, k)."""
    (batch, beams), k = running.shape, best.shape[-1]
    total = (best.view(batch, beams, k) + running[:, :, None]).view(batch, -1)
    scores, index = torch.topk(total, k)
    return scores, index // k, tokens.view(batch, -1).gather(1, index)


def _select(t: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """t[b, index[b]] for t (B, n, L) or (B, n)."""
    return t.gather(1, index) if t.dim() == 2 else t.gather(1, index[..., None].expand(-1, -1, t.shape[2]))


class _Search:
    """The state of the groups of beams of all prompts, tensors (G, n, ...). A plain search has one group per prompt.

    Scores are summed log-probabilities divided by length ** length_penalty. `running` are the scores of the unfinished
    beams, `ids` the best finished sequences.
    """

    def __init__(self, input_ids: torch.Tensor, groups: int, config: Any):
        eos, pad = end_tokens(config), pad_token(config)
        self.config, self.prompt, self.most = config, input_ids.shape[1], config.max_length
        self.beams = n = config.num_beams // groups
        self.count = len(input_ids) // n
        self.k = max(2, 1 + (0 if eos is None else len(eos))) * n
        device, shape = input_ids.device, (self.count, n)
        fill = int((pad or eos[0]) if eos is not None else -1)
        self.running_ids = torch.full((*shape, self.most), fill, dtype=torch.int64, device=device)
        self.running_ids[:, :, : self.prompt] = input_ids.view(*shape, -1)
        self.ids = self.running_ids.clone()
        self.running = torch.full(shape, _NEVER, device=device)
        self.running[:, 0] = 0.0  # all beams start equal, so only the first counts
        self.scores = torch.full(shape, _NEVER, device=device)
        self.ended = torch.zeros(shape, dtype=torch.bool, device=device)
        self.improvable = torch.ones((self.count, 1), dtype=torch.bool, device=device)
        self.over = torch.zeros(self.count, dtype=torch.bool, device=device)  # groups that cannot improve any more
        self.running_from = torch.full((*shape, self.most - self.prompt), -1, dtype=torch.int32, device=device)
        self.came_from = self.running_from.clone()
        self.first = torch.arange(self.k, device=device) < n  # only the best n continuations may finish
        self.chosen: torch.Tensor  # (g, n), the tokens that the last call of extend chose
        self.offset = (torch.arange(self.count, device=device) * n)[:, None]

    def extend(self, groups: slice, continuations: tuple, length: int, hits: Any) -> tuple[torch.Tensor, ...]:
        """Replace the running beams of `groups` by their best continuations.

        continuations: the result of _continuations. hits(ids): (rows, length + 1) -> (rows,) bool, True for rows that
        are finished. Returns scores, ids, origins and finished flags of the k best continuations, (g, k, ...) each.
        """
        top, beam, token = continuations
        top_ids = _select(self.running_ids[groups], beam)
        top_ids[:, :, length] = token
        top_from = _select(self.running_from[groups], beam)
        top_from[:, :, length - self.prompt] = beam + self.offset[groups]
        hit = hits(top_ids[:, :, : length + 1].flatten(0, 1)).view(top.shape)
        self.running[groups], chosen = torch.topk(top + hit.to(torch.float32) * _NEVER, self.beams)
        self.running_ids[groups], self.running_from[groups] = _select(top_ids, chosen), _select(top_from, chosen)
        # At the maximum length all continuations finish, and the best ones count as chosen.
        self.chosen = torch.where(hit.all(1, keepdim=True), token[:, : self.beams], token.gather(1, chosen))
        return top, top_ids, top_from, hit

    def close(self, length: int, top, top_ids, top_from, hit) -> None:
        """Keep the best finished sequences, and mark groups that cannot improve. length: includes the new token."""
        config, early = self.config, self.config.early_stopping
        ends, penalty = hit & self.first, config.length_penalty
        if bool(ends.any()):
            done = top / ((length - self.prompt) ** penalty)
            blocked = ~self.improvable | (self.ended.all(-1, keepdim=True) & (early is True))
            done = done + blocked.to(torch.float32) * _NEVER + (~ends).to(torch.float32) * _NEVER
            self.scores, chosen = torch.topk(torch.cat((self.scores, done), 1), self.beams)
            self.ids = _select(torch.cat((self.ids, top_ids), 1), chosen)
            self.came_from = _select(torch.cat((self.came_from, top_from), 1), chosen)
            self.ended = torch.cat((self.ended, ends), 1).gather(1, chosen)
        best_length = self.most - self.prompt if early == "never" and penalty > 0.0 else length - self.prompt
        possible = self.running[:, :1] / (best_length**penalty)
        worst = torch.where(self.ended, self.scores.amin(1, keepdim=True), _NEVER)
        self.improvable = self.improvable & (possible > worst).any(-1, keepdim=True)
        self.over = ~self.improvable.squeeze(1)
        if early is True:
            self.over |= self.ended.all(-1)


def beam_search(
    stepper: Stepper, input_ids: torch.Tensor, processors: Any, criteria: Any, config: Any, record: Record
) -> dict[str, torch.Tensor]:
    """sequences (B * n, longest), sequences_scores (B * n,) and beam_indices (B * n, generated), as in HF's output.

    input_ids: (B * K, S), each prompt repeated K = config.num_beams times. With config.num_beam_groups = G > 1 there
        are
    G searches with K / G beams each. A step extends the groups in turn, and subtracts diversity_penalty from a token's
    log-probability (after the processors) for every beam of the prompt's earlier groups that chose it in this step.
    Source: the rules for finishing are those of HF's GenerationMixin._beam_search; Vijayakumar et al., Diverse Beam
    Search, 2016, with Hamming diversity.
    """
    rules, processors = known_rules(processors), in_place(processors)
    beams, groups = config.num_beams, config.num_beam_groups or 1
    search, batch, length = _Search(input_ids, groups, config), len(input_ids) // beams, input_ids.shape[1]
    live = LiveRows(stepper, batch * beams, fixed=record.active or config.do_sample)
    logits = stepper.start().repeat_interleave(beams, 0)
    alike = groups == 1 and not config.do_sample and not record.active and logits.shape[1] >= 2 * search.k
    best = None  # of each beam, where the stepper ranks them

    def hits(ids):
        return criteria(ids, record.scores)

    while True:
        found = []
        if best is not None:
            found.append(search.extend(slice(None), _best_of_beams(*best, search.running), length, hits))
        else:
            flat_ids = search.running_ids[:, :, :length].flatten(0, 1)
            raw = logits.to(torch.float32, copy=True) if record.active else None
            logits = logits.to(torch.float32)
            log_probs = processors(flat_ids, torch.log_softmax(logits, -1, out=logits))  # fresh memory would cost more
            if raw is not None:
                record.add(raw, log_probs.clone())
            for part, scores in _turns(search, log_probs, groups):
                chosen = _continuations(scores, search.running[part], search.k, config.do_sample)
                found.append(search.extend(part, chosen, length, hits))
        top, top_ids, top_from, hit = found[0]
        if groups > 1:
            top, top_ids, top_from, hit = (torch.stack(t, 1).flatten(0, 1) for t in zip(*found))
        length += 1
        search.close(length, top, top_ids, top_from, hit)
        early = config.early_stopping is True
        go_on = search.improvable.any() & ~(search.ended.all() & early) & ~hit.all()
        live.reorder(search.running_from[:, :, length - 1 - search.prompt].flatten().long())
        if not bool(go_on):
            break
        live.drop(search.over.view(batch, groups).all(1).repeat_interleave(beams))
        tokens = search.running_ids[:, :, length - 1].flatten()
        ranks = alike and rules is not None and rules.forced(length) is None
        best = live.rank(tokens, search.k, rules.barred(length)) if ranks else None
        if best is None:
            logits = live.step(tokens)

    n = config.num_return_sequences
    scores, order = search.scores.view(batch, beams).sort(dim=-1, descending=True, stable=True)
    came_from = _select(search.came_from.view(batch, beams, -1), order[:, :n]).flatten(0, 1)
    generated = int((came_from >= 0).sum(1).max())
    ids = _select(search.ids.view(batch, beams, -1), order[:, :n]).flatten(0, 1)
    return {
        "sequences": ids[:, : search.prompt + generated],
        "sequences_scores": scores[:, :n].flatten(),
        "beam_indices": came_from[:, :generated],
    }


def _turns(search: _Search, log_probs: torch.Tensor, groups: int):
    """Yield the groups that are extended together, and their log-probabilities (rows, V). The groups of one prompt are
    extended one after the other."""
    if groups == 1:
        yield slice(None), log_probs
        return
    by_group = log_probs.unflatten(0, (-1, groups, search.beams))
    counts = torch.zeros_like(by_group[:, 0, 0])  # (B, V): how many beams have chosen each token
    for g in range(groups):
        part = slice(g, None, groups)
        yield part, (by_group[:, g] - search.config.diversity_penalty * counts[:, None]).flatten(0, 1)
        going = (~search.over[part, None]).to(counts.dtype)
        counts.scatter_add_(1, search.chosen, going.expand(search.chosen.shape))
