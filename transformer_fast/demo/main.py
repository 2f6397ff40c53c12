"""`transformer-fast demo`, from the checkpoint to tables and pictures."""

import os
import pathlib
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from .. import backends
from ..benchmarks.memory import peak_memory_mb
from ..benchmarks.timing import Timing, ratios
from . import encode
from .checkpoint import load_sentences, locate, tokenize

__all__ = ["DemoResult", "run"]

HUGGING_FACE, SORTED, OURS = "Hugging Face", "  sorted by length", "transformer_fast"
PICTURED = "Penguins are birds that swim rather than fly."
QUERIES = [
    "Animals that hunt by listening for echoes.",
    "I want my money back.",
    "A mother hopes that her daughters will marry well.",
    "The detective follows a clue.",
    "Why do species change over time?",
    "planets and stars",
]


class DemoResult(NamedTuple):
    """error: the largest difference from Hugging Face's in any element of an embedding. speedup: over Hugging Face,
    from the medians of the passes. memory_mb: {model name: peak}. nearest: {query: (similarity, sentence)}."""

    timings: dict[str, Timing]
    error: float
    speedup: float
    memory_mb: dict[str, float]
    nearest: dict[str, list[tuple[float, str]]]
    pictures: list[pathlib.Path]


def run(
    output: str | os.PathLike = "demo_output",
    *,
    sentences: list[str] | None = None,
    passes: int = 5,
    seconds: float = 22.0,
    memory: bool = True,
    console: Console | None = None,
) -> DemoResult:
    """Encode sentences with all-MiniLM-L6-v2, by Hugging Face's BertModel and by this package's, and compare.

    output: folder for the pictures. sentences: by default those shipped with the demo. passes: how many times each
    model encodes all of them, fewer when `seconds` run out. memory: measure peak memory, in one process per model.
    Raises CheckpointMissing, with the pip command, when the checkpoint's package is not installed.
    """
    checkpoint = locate()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import AutoTokenizer
    from transformers.utils import logging

    from .pictures import attention_picture, timing_picture

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    console = console or Console()
    sentences = sentences or load_sentences()
    folder = pathlib.Path(output)
    folder.mkdir(parents=True, exist_ok=True)

    batches = tokenize(checkpoint, sentences)
    lengths = [int(n) for _, mask in batches for n in mask.sum(1)]
    padded, threads = sum(mask.numel() for _, mask in batches), torch.get_num_threads()
    console.print(
        f"{len(sentences)} sentences of {min(lengths)} to {max(lengths)} tokens, {sum(lengths):,} in all; padded in "
        f"batches of {max(len(ids) for ids, _ in batches)} they are {padded:,}. "
        f"{threads} thread{'s' if threads > 1 else ''}."
    )
    theirs, ours = encode.load_hugging_face(checkpoint), encode.load_ours(checkpoint)
    timings, embeddings = _encode_all(theirs, ours, batches, passes, seconds)
    error = (embeddings[OURS] - embeddings[HUGGING_FACE]).abs().max().item()
    used = _memory(batches, sentences) if memory else {}
    console.print(_comparison(timings, embeddings, used, len(sentences)))
    console.print(_backends(ours.config))

    nearest = _nearest(ours, checkpoint, sentences, embeddings[OURS])
    console.print(_neighbours(nearest))
    with tqdm(total=2, desc="pictures", leave=False, disable=None) as bar:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        pictures = [attention_picture(ours, tokenizer, PICTURED, folder / "attention.png")]
        bar.update()
        pictures.append(timing_picture(timings, lengths, padded, folder / "timing.png"))
        bar.update()
    for picture in pictures:
        console.print(f"picture: {picture}", soft_wrap=True)
    speedup = ratios(timings[HUGGING_FACE], timings[OURS]).median
    return DemoResult(timings, error, speedup, used, nearest, pictures)


def _encode_all(theirs, ours, batches: encode.Batches, passes: int, seconds: float):
    """Times and embeddings of the three ways, in the order of the sentences."""
    by_length, order = encode.sorted_batches(batches, max(len(ids) for ids, _ in batches))
    ways: dict[str, tuple] = {HUGGING_FACE: (theirs, batches), SORTED: (theirs, by_length), OURS: (ours, batches)}
    warm = min(2, len(batches))
    steps = sum(len(b) for _, b in ways.values()) * passes + warm * len(ways)
    with tqdm(total=steps, unit="batch", desc="encoding", leave=False, disable=None) as bar:

        def encoding(name: str) -> Callable[[], torch.Tensor]:
            model, mine = ways[name]

            def call():
                bar.set_postfix_str(name, refresh=False)
                return encode.embed(model, mine, bar.update)

            return call

        for model, mine in ways.values():
            encode.embed(model, mine[:warm], bar.update)
        timings, embeddings = encode.time_in_turns({name: encoding(name) for name in ways}, passes, seconds)
    embeddings[SORTED] = torch.empty_like(embeddings[SORTED]).index_copy_(0, order, embeddings[SORTED])
    return timings, embeddings


def _memory(batches: encode.Batches, sentences: list[str]) -> dict[str, float]:
    """Peak memory of each model on the batch with the most padded tokens."""
    start, widest, at = 0, 0, slice(0, 0)
    for ids, _ in batches:
        if ids.numel() > widest:
            widest, at = ids.numel(), slice(start, start + len(ids))
        start += len(ids)
    work = f"{encode.__name__}:memory_work"
    names = list(encode.LOADERS)
    with ThreadPoolExecutor() as pool, tqdm(total=len(names), desc="peak memory", leave=False, disable=None) as bar:

        def one(name: str) -> float:
            used = peak_memory_mb(work, model=name, sentences=sentences[at], threads=torch.get_num_threads())
            bar.update()
            return used

        return dict(zip(names, pool.map(one, names)))


def _nearest(model, checkpoint, sentences: list[str], embeddings: torch.Tensor, count: int = 2):
    found = encode.embed(model, tokenize(checkpoint, QUERIES)) @ embeddings.T
    nearest = {}
    for query, row in zip(QUERIES, found):
        best = row.topk(min(count, len(sentences)))
        nearest[query] = [(value, sentences[i]) for value, i in zip(best.values.tolist(), best.indices.tolist())]
    return nearest


# ---- tables ------------------------------------------------------------------------------------------
def _comparison(timings: dict[str, Timing], embeddings, used: dict[str, float], count: int) -> Table:
    table = Table(
        title="all-MiniLM-L6-v2 on the same sentences",
        caption="time: median of the passes; error: largest difference in any embedding; memory: peak, longest batch",
        title_justify="left",
        caption_justify="left",
    )
    for heading in ("", "time", "sentences/s", "speed-up", "error", "memory"):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    reference = timings[HUGGING_FACE]
    for name, timing in timings.items():
        error = (embeddings[name] - embeddings[HUGGING_FACE]).abs().max().item()
        table.add_row(
            name,
            f"{timing.median:.2f} s",
            f"{count / timing.median:.0f}",
            f"{ratios(reference, timing).median:.2f}x",
            "-" if name == HUGGING_FACE else f"{error:.1e}",
            f"{used[name]:.0f} MB" if name in used else "",
            style="bold" if name == OURS else None,
        )
    return table


def _backends(config) -> Table:
    """Which backend runs each op of this model on this machine, and why not the others."""
    table = Table(title="backend per op", title_justify="left")
    for heading in ("op", "backend", "why"):
        table.add_column(heading)
    width = config.hidden_size
    for op, size in (
        ("attention", width // config.num_attention_heads),
        ("norm", width),
        ("bias_activation", config.intermediate_size),
    ):
        call = backends.Call(op, "cpu", torch.float32, size)
        reasons = [line.strip() for line in backends.explain(call).splitlines()[1:]]
        table.add_row(op, backends.select(call).name, "; ".join(reasons))
    return table


def _neighbours(nearest: dict[str, list[tuple[float, str]]]) -> Table:
    table = Table(title="nearest sentences", title_justify="left")
    table.add_column("query", max_width=24)
    table.add_column("", justify="right")
    table.add_column("sentence")
    for query, found in nearest.items():
        for rank, (similarity, sentence) in enumerate(found):
            shown = textwrap.shorten(sentence, 130, placeholder=" ...")
            table.add_row("" if rank else query, f"{similarity:.2f}", shown, end_section=rank == len(found) - 1)
    return table
