"""The generation part of verify: the same tokens as Hugging Face for greedy, beam search and seeded sampling."""

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

__all__ = ["Comparison", "MODES", "NEW_TOKENS", "compare_tokens"]

NEW_TOKENS, SEED = 8, 0
# The decoding modes that are compared, with the arguments of generate in addition to the checkpoint's generation
# config.
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"num_beams": 1, "do_sample": False},
    "3 beams": {"num_beams": 3, "do_sample": False},
    "sampled": {"num_beams": 1, "do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0},
}
# If the float64 logits of two tokens differ by less than this factor times Hugging Face's own error, it is a tie.
TIE = 4.0


class Comparison(NamedTuple):
    """mode: a name in MODES. same: None if there is nothing to compare. note: the rows that differ, or the reason."""

    mode: str
    same: bool | None
    note: str


def compare_tokens(theirs, ours, reference, inputs: dict[str, torch.Tensor], error: float) -> Iterator[Comparison]:
    """Compare generated tokens in each of MODES, from a ragged batch of prompts (padded on the left, for
    encoder-decoders on the right).

    theirs, ours: the models in the dtype that is compared. reference: the model in float64. error: the error of Hugging
    Face's logits in that dtype. A row with different tokens still counts as the same if float64 shows a tie: the scores
    of the first two tokens that differ, or of the beams, are within TIE times that error.
    """
    for mode, settings in MODES.items():
        try:
            wanted = _generate(theirs, inputs, settings)
        except Exception as failure:  # heads that inherit generate but cannot generate: nothing to compare
            yield Comparison(
                mode, None, f"Hugging Face itself does not generate: {' '.join(str(failure).split())[:120]}"
            )
            return
        got = _generate(ours, inputs, settings)
        off = [r for r in range(len(wanted)) if not torch.equal(wanted[r], got[r])]
        excused = {r: _excuse(reference, inputs, settings, wanted, got, r, error) for r in off}
        wrong = [r for r, excuse in excused.items() if excuse is None]
        if wrong:
            first = _first(wanted[wrong[0]], got[wrong[0]])
            note = f"{len(wrong)} of {len(wanted)} rows: sentence {wrong[0]} from new token {first}"
        else:
            note = "; ".join(f"sentence {r}: {excuse}" for r, excuse in excused.items())
        yield Comparison(mode, not wrong, note)


def _generate(model, inputs: dict[str, torch.Tensor], settings: dict) -> torch.Tensor:
    """Generate and return the new tokens, (rows, NEW_TOKENS)."""
    config = copy.deepcopy(model.generation_config)
    config.max_length = None
    config.update(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, num_return_sequences=1, **settings)
    if config.pad_token_id is None:
        config.pad_token_id = 0
    torch.manual_seed(SEED)
    return model.generate(**inputs, generation_config=config)[:, -NEW_TOKENS:]


def _first(a: torch.Tensor, b: torch.Tensor) -> int:
    """The index, from 0, of the first new token in which two rows differ."""
    return int((a != b).nonzero()[0])


def _excuse(reference, inputs, settings, wanted, got, row: int, error: float) -> str | None:
    """Why the tokens of a row may differ, or None if they must not."""
    scores = [_log_probabilities(reference, inputs, row, tokens[row]) for tokens in (wanted, got)]
    if settings["num_beams"] > 1:
        sums = [s.gather(1, t[row, :, None].to(s.device)).sum().item() for s, t in zip(scores, (wanted, got))]
        return "a tie of beams within rounding" if sums[1] >= sums[0] - TIE * error * NEW_TOKENS else None
    at = _first(wanted[row], got[row])
    keys = scores[0][at]
    if settings["do_sample"]:
        keys = keys - _draws(len(wanted), keys, at)[row].log()
    gap = (keys[wanted[row, at]] - keys[got[row, at]]).abs().item()
    return f"a tie within rounding at new token {at}" if gap <= TIE * error else None


def _draws(rows: int, like: torch.Tensor, step: int) -> torch.Tensor:
    """The exponential variables q of one sampling step: torch.multinomial chooses the largest p / q."""
    torch.manual_seed(SEED)
    for _ in range(step + 1):
        q = torch.empty(rows, like.shape[-1], device=like.device).exponential_()
    return q.double()


@torch.no_grad()
def _log_probabilities(reference, inputs, row: int, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (NEW_TOKENS, V) in float64 of each new token, given the row's prompt without padding and the
    tokens before it."""
    prompt = inputs["input_ids"][row][inputs["attention_mask"][row].bool()][None]
    if reference.config.is_encoder_decoder:
        start = tokens.new_full((1, 1), reference.generation_config.decoder_start_token_id)
        logits = reference(input_ids=prompt, decoder_input_ids=torch.cat([start, tokens[None, :-1]], 1)).logits
    else:
        logits = reference(input_ids=torch.cat([prompt, tokens[None, :-1]], 1)).logits
    return logits[0, -NEW_TOKENS:].log_softmax(-1)
