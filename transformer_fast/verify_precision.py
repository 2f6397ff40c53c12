"""Measures the accuracy cost of low precision: a quantised model compared with the same model in float32."""

import copy
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .quantization import PRECISIONS, is_int8_model, quantize, quantized_modules, why_not_bfloat16
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
    embeddings (token means), and whether each sentence keeps its nearest neighbour; the most likely class, token,
    choice, or start and end of the answer; the difference of a single output; greedily generated tokens.

    Args:
        checkpoint: a folder, or a name on the hub.
        precision: "int8" or "bf16", as in transformer_fast.quantize.
        progress: called with a text before each step.

    Returns:
        A PrecisionReport.

    Raises:
        VerifyError: if the checkpoint cannot be loaded, is quantised already, has weights that are not finite or takes
            no tokens, the precision is unknown, or the processor has none in bfloat16; the message is one line.
    """
    if precision not in PRECISIONS:
        raise VerifyError(f"precision: wanted one of {', '.join(PRECISIONS)}, got {precision}")
    progress("loading")
    exact: Any = _load_ours(checkpoint, _load_theirs(checkpoint))[0]
    size = _megabytes(exact)
    progress(f"to {precision}")
    low = _quantized(exact, precision)
    batches, text = _batches(checkpoint, exact)
    progress("hidden states and logits")
    _try(exact, batches[0])
    costs = list(_compare_outputs(exact, low, batches))
    if exact.can_generate() and exact.main_input_name == "input_ids":
        progress("generating")
        costs += _compare_generated(exact, low, batches[0])
    left = quantized_modules(low).left if precision == "int8" else {}
    return PrecisionReport(type(exact).__name__, precision, text, left, (size, _megabytes(low)), costs)


def _quantized(exact: Any, precision: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the report says what was left
        try:
            low = quantize(copy.deepcopy(exact), precision)
        except ValueError as error:
            raise VerifyError(f"{type(exact).__name__}: cannot be quantised: {error}") from error
    if precision == "int8" and not is_int8_model(low):
        raise VerifyError(f"{type(exact).__name__}: has no linear layer that can be int8")
    if precision == "bf16" and low.dtype != torch.bfloat16:
        raise VerifyError(f"precision: bf16 changes nothing here, as {why_not_bfloat16()}")
    return low


def _try(model: Any, batch: dict[str, torch.Tensor]) -> None:
    """Raise VerifyError for a model that needs more than tokens."""
    try:
        _run(model, {name: t[:2] for name, t in batch.items()})
    except Exception as error:  # another's model may raise anything
        text = " ".join(str(error).split())
        raise VerifyError(
            f"{type(model).__name__}: cannot be run on tokens alone: {text[:200]} [{type(error).__name__}]"
        ) from error


def _megabytes(model: nn.Module) -> float:
    return sum(t.nbytes for t in {t.data_ptr(): t for t in model.state_dict().values()}.values()) / 1e6


def _batches(checkpoint, model) -> tuple[list[dict[str, torch.Tensor]], str]:
    """The batches and a description of the text. Padding is on the left for decoders that generate, else on the
    right."""
    from .demo.checkpoint import load_sentences

    config, text = model.config, model.config.get_text_config()
    vocabulary = getattr(text, "vocab_size", None)
    if model.main_input_name != "input_ids" or not vocabulary:
        what = f"takes {model.main_input_name}" if vocabulary else "has no vocabulary of tokens"
        raise VerifyError(f"{type(model).__name__}: {what}; verify --precision knows models of input_ids")
    side = "left" if model.can_generate() and not config.is_encoder_decoder else "right"
    # RoBERTa's families count positions from the one after that of padding, which is 1.
    positions = (getattr(text, "max_position_embeddings", None) or _LONGEST + 2) - 2
    longest = min(_LONGEST, max(positions, 1))
    lines = load_sentences()[:_SENTENCES]
    found = _tokenized(checkpoint, lines, side, longest)
    if not isinstance(found, str) and all(_is_text(batch, vocabulary) for batch in found):
        return found, f"{len(lines)} sentences"
    why = found if isinstance(found, str) else "the checkpoint has no tokenizer for English sentences"
    generator = torch.Generator().manual_seed(0)
    end = getattr(text, "eos_token_id", None)
    end = end[0] if isinstance(end, list) else end
    special = {end, *(getattr(text, f"{name}_token_id", None) for name in ("pad", "bos", "sep", "cls", "mask"))}
    usual = torch.tensor([i for i in range(min(vocabulary, 30000)) if i not in special])
    made = []
    for _ in range(2):
        lengths = torch.randint(min(2, longest), min(longest, 40) + 1, (_BATCH, 1), generator=generator)
        mask = torch.arange(int(lengths.max())) < lengths
        ids = usual[torch.randint(0, len(usual), mask.shape, generator=generator)]
        if end is not None and config.is_encoder_decoder:  # heads of BART read the state at this token
            ids.scatter_(1, lengths - 1, end)
        ids, mask = (t.flip(1) if side == "left" else t for t in (ids.masked_fill(~mask, _padding(text)), mask))
        made.append({"input_ids": ids, "attention_mask": mask.long()})
    return made, f"random tokens ({why})"


def _padding(config) -> int:
    pad = getattr(config, "pad_token_id", None)
    return 0 if pad is None or not 0 <= pad < config.vocab_size else pad


def _tokenized(checkpoint, lines: list[str], side: str, longest: int) -> list[dict[str, torch.Tensor]] | str:
    """The lines as batches of token ids, or why the checkpoint's tokenizer cannot make them."""
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint, padding_side=side)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        found = [
            tokenizer(
                lines[i : i + _BATCH], padding=True, truncation=True, max_length=longest, return_tensors="pt",
                return_attention_mask=True,
            )
            for i in range(0, len(lines), _BATCH)
        ]  # fmt: skip
    except Exception as error:  # there are no files for one, or its code raises anything: the report says so
        text = " ".join(str(error).split())
        return f"its tokenizer cannot be used: {text[:200]} [{type(error).__name__}]"
    return [{k: b[k] for k in ("input_ids", "attention_mask")} for b in found]


def _is_text(batch: dict[str, torch.Tensor], vocabulary: int) -> bool:
    """False if the batch has few different tokens: without tokenizer files transformers creates an empty tokenizer, for
    which every word is unknown."""
    ids, mask = batch.values()
    return ids[mask.bool()].unique().numel() > 12 and bool((mask.sum(1) > 1).all()) and int(ids.max()) < vocabulary


class _Outputs(NamedTuple):
    """states: (B, S, E), or None if the model returns none. mask: (B, S), True for tokens. logits: by name."""

    states: torch.Tensor | None
    mask: torch.Tensor
    logits: dict[str, torch.Tensor]


def _run(model, batch: dict[str, torch.Tensor]) -> _Outputs:
    given, kind = dict(batch), type(model).__name__
    if model.config.is_encoder_decoder and not kind.endswith(("Classification", "QuestionAnswering")):
        given["decoder_input_ids"] = batch["input_ids"][:, :16]
    if kind.endswith("MultipleChoice"):
        given = {k: t.unflatten(0, (-1, 2)) for k, t in batch.items()}
    output = model(**given, output_hidden_states=True)
    states = output.get("decoder_hidden_states") or output.get("hidden_states")
    mask = batch["attention_mask"].bool()
    mask = mask[:, : given["decoder_input_ids"].shape[1]] if "decoder_input_ids" in given else mask
    logits = {k: t.float() for k, t in output.items() if k.endswith("logits") and isinstance(t, torch.Tensor)}
    return _Outputs(states[-1].float() if states else None, mask, logits)


def _compare_outputs(exact, low, batches) -> Iterator[Cost]:
    pairs = [(_run(exact, batch), _run(low, batch)) for batch in batches]
    yield from _compare_states(pairs)
    for name in pairs[0][0].logits:
        first, second = (torch.cat([_answers(type(exact).__name__, name, p[i]) for p in pairs]) for i in (0, 1))
        if first.is_floating_point():
            difference = (first - second).abs() / first.std()
            value = f"{difference.mean():.4f}, most {difference.max():.3f}"
            yield Cost("output differs by", value, f"of the standard deviation of {len(first)} outputs")
            continue
        what = "output" if name == "logits" else name.removesuffix("_logits")
        yield Cost(
            f"likeliest {what} the same", f"{(first == second).float().mean():.1%}", f"of {len(first)} positions"
        )


def _answers(kind: str, name: str, found: _Outputs) -> torch.Tensor:
    """The most likely class, token or position of each row or token; for a single output, its value."""
    logits, mask = found.logits[name], found.mask
    if logits.dim() == 1:  # one score for each row
        return logits
    if kind.endswith("QuestionAnswering") and logits.shape == mask.shape:
        return logits.masked_fill(~mask, -torch.inf).argmax(-1)
    if kind.endswith("ForPreTraining") and logits.shape == mask.shape:  # ELECTRA's: replaced or not
        return (logits > 0)[mask]
    rows = logits[mask] if logits.shape[:2] == mask.shape and logits.dim() == 3 else logits.flatten(0, -2)
    return rows[:, 0] if rows.shape[1] == 1 else rows.argmax(-1)


def _compare_states(pairs: list[tuple[_Outputs, _Outputs]]) -> Iterator[Cost]:
    if any(found.states is None for pair in pairs for found in pair):
        return
    cosines = []
    means: tuple[list[torch.Tensor], list[torch.Tensor]] = [], []
    for one, other in pairs:
        mask = one.mask
        cosines.append(F.cosine_similarity(one.states[mask], other.states[mask], dim=-1))  # type: ignore[index]
        for kept, t in zip(means, (one.states, other.states)):
            kept.append((t * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1))  # type: ignore[operator]
    token = torch.cat(cosines)
    first, second = (F.normalize(torch.cat(kept), dim=-1) for kept in means)
    sentence = (first * second).sum(-1)
    nearest = [(t @ t.t()).fill_diagonal_(-2.0).argmax(1) for t in (first, second)]
    unchanged = (nearest[0] == nearest[1]).float().mean().item()
    yield Cost("token cosine", f"{token.mean():.5f}, least {token.min():.4f}", f"{token.numel()} tokens")
    yield Cost("sentence cosine", f"{sentence.mean():.5f}, least {sentence.min():.4f}", f"{len(sentence)} sentences")
    yield Cost("nearest sentence the same", f"{unchanged:.1%}", f"of {len(sentence)} sentences")


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
