"""Measures the accuracy cost of low precision: a quantised model compared with the same model in float32."""

import copy
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .quantization import PRECISIONS, quantize, quantized_modules
from .verify import VerifyError, _load_ours, _load_theirs

__all__ = ["Cost", "PrecisionReport", "verify_precision"]

_SENTENCES, _BATCH, _LONGEST = 96, 16, 128
_NEW_TOKENS = 24


class Cost(NamedTuple):
    """One measure. note: what was measured, and how to read it."""

    what: str
    value: str
    note: str


class PrecisionReport(NamedTuple):
    """The result of verify_precision. model: the class. text: the kind of input. left: the modules that are not in low
    precision, and why. megabytes: size of the parameters in float32 and in low precision."""

    model: str
    precision: str
    text: str
    left: dict[str, str]
    megabytes: tuple[float, float]
    costs: list[Cost]


@torch.no_grad()
def verify_precision(
    checkpoint: str | os.PathLike,
    precision: str = "int8",
    *,
    progress: Callable[[str], object] = lambda text: None,
) -> PrecisionReport:
    """Load a checkpoint, quantise a copy, and compare the two on ragged text: sentences, or random tokens if there is
    no tokenizer.

    Compared, as far as the model has them: the cosine of the hidden states of each token; the cosine of sentence
    embeddings (token means), and whether each sentence keeps its nearest neighbour; the most likely class or token at
    each position; greedily generated tokens.

    Args:
        checkpoint: a folder, or a name on the hub.
        precision: "int8" or "bf16", as in transformer_fast.quantize.
        progress: called with a text before each step.

    Returns:
        A PrecisionReport.

    Raises:
        VerifyError: if the checkpoint cannot be loaded or the precision is unknown; the message is one line.
    """
    if precision not in PRECISIONS:
        raise VerifyError(f"precision: wanted one of {', '.join(PRECISIONS)}, got {precision}")
    progress("loading")
    exact: Any = _load_ours(checkpoint, _load_theirs(checkpoint))[0]
    size = _megabytes(exact)
    progress(f"to {precision}")
    low = quantize(copy.deepcopy(exact), precision)
    batches, text = _batches(checkpoint, exact)
    progress("hidden states and logits")
    costs = list(_compare_outputs(exact, low, batches))
    if exact.can_generate() and exact.main_input_name == "input_ids":
        progress("generating")
        costs += _compare_generated(exact, low, batches[0])
    left = quantized_modules(low).left if precision == "int8" else {}
    return PrecisionReport(type(exact).__name__, precision, text, left, (size, _megabytes(low)), costs)


def _megabytes(model: nn.Module) -> float:
    return sum(t.nbytes for t in {t.data_ptr(): t for t in model.state_dict().values()}.values()) / 1e6


def _batches(checkpoint, model) -> tuple[list[dict[str, torch.Tensor]], str]:
    """The batches and a description of the text. Padding is on the left for decoders that generate, else on the
    right."""
    from .demo.checkpoint import load_sentences

    config = model.config
    side = "left" if model.can_generate() and not config.is_encoder_decoder else "right"
    longest = min(_LONGEST, getattr(config, "max_position_embeddings", None) or _LONGEST)
    lines = load_sentences()[:_SENTENCES]
    found = _tokenized(checkpoint, lines, side, longest)
    if found and all(_is_text(batch, config.vocab_size) for batch in found):
        return found, f"{len(lines)} sentences"
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(2):
        lengths = torch.randint(2, min(longest, 40) + 1, (_BATCH, 1), generator=generator)
        mask = torch.arange(int(lengths.max())) < lengths
        mask = mask.flip(1) if side == "left" else mask
        ids = torch.randint(0, config.vocab_size, mask.shape, generator=generator)
        made.append({"input_ids": ids, "attention_mask": mask.long()})
    return made, "random tokens (no tokenizer was found)"


def _tokenized(checkpoint, lines: list[str], side: str, longest: int) -> list[dict[str, torch.Tensor]]:
    """The lines as batches of token ids; empty if the checkpoint has no tokenizer."""
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint, padding_side=side)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        found = [
            tokenizer(lines[i : i + _BATCH], padding=True, truncation=True, max_length=longest, return_tensors="pt")
            for i in range(0, len(lines), _BATCH)
        ]
    except Exception:  # no usable tokenizer: the caller uses random tokens
        return []
    return [{k: b[k] for k in ("input_ids", "attention_mask")} for b in found]


def _is_text(batch: dict[str, torch.Tensor], vocabulary: int) -> bool:
    """False if the batch has no real tokens: without tokenizer files transformers creates an empty tokenizer."""
    ids, mask = batch.values()
    return bool(ids.numel()) and bool((mask.sum(1) > 1).all()) and int(ids.max()) < vocabulary


def _run(model, batch: dict[str, torch.Tensor]):
    """Returns (last hidden states (B, S, E), mask (B, S), logits or None)."""
    given = dict(batch)
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = batch["input_ids"][:, :16]
    output = model(**given, output_hidden_states=True)
    mask = batch["attention_mask"].bool()
    if model.config.is_encoder_decoder:
        mask = mask[:, : given["decoder_input_ids"].shape[1]]
        states = output.decoder_hidden_states[-1]
    else:
        states = output.hidden_states[-1]
    logits = output.get("logits")
    return states.float(), mask, logits


def _compare_outputs(exact, low, batches) -> Iterator[Cost]:
    cosines, same, total = [], 0, 0
    means: tuple[list[torch.Tensor], list[torch.Tensor]] = [], []
    for batch in batches:
        (states, mask, logits), (found, _, others) = _run(exact, batch), _run(low, batch)
        cosines.append(F.cosine_similarity(states[mask], found[mask], dim=-1))
        for kept, t in zip(means, (states, found)):
            kept.append((t * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1))
        if logits is not None:
            agree = logits.argmax(-1) == others.argmax(-1)
            agree = agree[mask] if agree.shape == mask.shape else agree.flatten()
            same, total = same + int(agree.sum()), total + agree.numel()
    token = torch.cat(cosines)
    first, second = (F.normalize(torch.cat(kept), dim=-1) for kept in means)
    sentence = (first * second).sum(-1)
    nearest = [(t @ t.t()).fill_diagonal_(-2.0).argmax(1) for t in (first, second)]
    unchanged = (nearest[0] == nearest[1]).float().mean().item()
    yield Cost("token cosine", f"{token.mean():.5f}, least {token.min():.4f}", f"{token.numel()} tokens")
    yield Cost("sentence cosine", f"{sentence.mean():.5f}, least {sentence.min():.4f}", f"{len(sentence)} sentences")
    yield Cost("nearest sentence the same", f"{unchanged:.1%}", f"of {len(sentence)} sentences")
    if total:
        yield Cost("likeliest output the same", f"{same / total:.1%}", f"of {total} positions")


def _compare_generated(exact, low, batch) -> Iterator[Cost]:
    limit = getattr(exact.config, "max_position_embeddings", None) or 10 * _LONGEST
    count = min(_NEW_TOKENS, limit // 2)
    pad = exact.generation_config.pad_token_id
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "num_beams": 1}
    options["pad_token_id"] = 0 if pad is None else pad
    room = limit - count
    small = {k: v[:8, -room:] for k, v in batch.items()}
    one, other = (m.generate(**small, **options)[:, -count:] for m in (exact, low))
    agree = (one == other).long()
    rows = f"of {one.numel()} generated greedily, {len(one)} rows; a different token changes all later ones"
    yield Cost("generated tokens the same", f"{agree.float().mean():.1%}", rows)
    yield Cost("generated before the first that differs", f"{agree.cumprod(1).sum(1).float().mean():.1f}", rows)
