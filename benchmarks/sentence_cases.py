"""sentence-transformers' encode, which sorts by length itself: with and without accelerate()."""

from collections.abc import Callable
from functools import partial

import torch

from .case import OURS, Bar, Candidate, Case

__all__ = ["sentence_cases"]

THEIRS = "sentence-transformers"


def _encode(sentences: list[str], fast: bool = False, dtype: torch.dtype = torch.float32) -> Callable:
    from sentence_transformers import SentenceTransformer

    import transformer_fast

    from .checkpoints import minilm

    model = SentenceTransformer(str(minilm()), device="cpu", model_kwargs={"dtype": dtype})
    if fast:
        transformer_fast.accelerate(model, verbose=False)
    return partial(model.encode, sentences, convert_to_tensor=True, show_progress_bar=False)


def _sentences(tiny: bool) -> list[str]:
    from transformer_fast.demo.checkpoint import load_sentences

    return load_sentences()[: 4 if tiny else None]


def sentence_cases(device: str) -> list[Case]:
    if device != "cpu":
        return []
    needs = ("sentence_transformers", "transformers")
    low = {"low_precision": True}
    return [
        Case(
            name="sentence-transformers/minilm-encode",
            title="SentenceTransformer.encode, all-MiniLM-L6-v2 on the demo's real sentences",
            inputs=_sentences,
            candidates=(
                Candidate(OURS, partial(_encode, fast=True), needs),
                Candidate(f"{OURS} bf16", partial(_encode, fast=True, dtype=torch.bfloat16), needs, **low),
                Candidate(THEIRS, _encode, needs),
                Candidate(f"{THEIRS} bf16", partial(_encode, dtype=torch.bfloat16), needs, **low),
            ),
            peer=THEIRS,
            dtype="fp32",
            shape="the demo's sentences, batches of 32",
            bar=Bar(2.4),
        )
    ]
