"""Sentence embeddings with either model: timing in turns, and memory."""

import pathlib
import time
from collections.abc import Callable, Mapping

import torch

from ..benchmarks.timing import Timing
from .checkpoint import locate, tokenize

__all__ = ["Batches", "embed", "load_hugging_face", "load_ours", "memory_work", "sorted_batches", "time_in_turns"]

Batches = list[tuple[torch.Tensor, torch.Tensor]]


def load_hugging_face(checkpoint: pathlib.Path):
    from transformers import BertModel

    return BertModel.from_pretrained(checkpoint, attn_implementation="sdpa", add_pooling_layer=False).eval()


def load_ours(checkpoint: pathlib.Path):
    from transformer_fast import BertModel

    return BertModel.from_pretrained(checkpoint, add_pooling_layer=False).eval()


LOADERS = {"Hugging Face": load_hugging_face, "transformer_fast": load_ours}


def embed(model, batches: Batches, on_batch: Callable[[], object] = lambda: None) -> torch.Tensor:
    """(sentences, width): the mean of each sentence's last hidden states, normalised, as the model was trained."""
    means = []
    with torch.inference_mode():
        for ids, mask in batches:
            hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
            real = mask.unsqueeze(-1).to(hidden.dtype)
            means.append((hidden * real).sum(1) / real.sum(1))
            on_batch()
        return torch.nn.functional.normalize(torch.cat(means), dim=-1)


def sorted_batches(batches: Batches, size: int) -> tuple[Batches, torch.Tensor]:
    """The same sentences, sorted by length, in batches of `size`; and the former index of each."""
    rows = [(ids[i], mask[i]) for ids, mask in batches for i in range(len(ids))]
    lengths = torch.tensor([int(mask.sum()) for _, mask in rows])
    order = lengths.argsort(descending=True, stable=True)
    groups: Batches = []
    for chosen in order.split(size):
        longest = int(lengths[chosen].max())
        ids, mask = (_stack([rows[i][part] for i in chosen.tolist()], longest) for part in (0, 1))
        groups.append((ids, mask))
    return groups, order


def _stack(rows: list[torch.Tensor], length: int) -> torch.Tensor:
    return torch.stack([torch.nn.functional.pad(row[:length], (0, length - row[:length].shape[0])) for row in rows])


def time_in_turns(
    calls: Mapping[str, Callable[[], torch.Tensor]], passes: int, seconds: float
) -> tuple[dict[str, Timing], dict[str, torch.Tensor]]:
    """Run every call once per pass, in rotating order: (times, last results). Runs at most `passes` passes, and starts
    no new one after `seconds`."""
    timings = {name: Timing() for name in calls}
    last: dict[str, torch.Tensor] = {}
    names, start = list(calls), time.perf_counter()
    for turn in range(passes):
        if turn and time.perf_counter() - start > seconds:
            break
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            begin = time.perf_counter()
            last[name] = calls[name]()
            timings[name].seconds.append(time.perf_counter() - begin)
    return timings, last


def memory_work(model: str, sentences: list[str], threads: int):
    """Encode the longest batch, in the steps that benchmarks.memory.peak_memory_mb expects."""
    torch.set_num_threads(threads)
    checkpoint = locate()
    load = LOADERS[model]
    embed(load(checkpoint), tokenize(checkpoint, ["One short sentence."]))
    batches = tokenize(checkpoint, sentences)
    yield
    loaded = load(checkpoint)
    yield
    embed(loaded, batches)
