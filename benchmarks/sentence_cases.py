"""sentence-transformers' encode, which sorts by length itself: with and without accelerate()."""

from collections.abc import Callable
from functools import partial

import torch

from .case import OURS, Bar, Candidate, Case

__all__ = ["sentence_cases"]

THEIRS = "sentence-transformers"


def _encode(
    sentences: list[str], fast: bool = False, dtype: torch.dtype = torch.float32, precision: str | None = None
) -> Callable:
    from sentence_transformers import SentenceTransformer

    import transformer_fast

    from .checkpoints import minilm

    model = SentenceTransformer(str(minilm()), device="cpu", model_kwargs={"dtype": dtype})
    if fast:
        transformer_fast.accelerate(model, precision=precision, verbose=False)
    return partial(model.encode, sentences, convert_to_tensor=True, show_progress_bar=False)


def _openvino(sentences: list[str], **options) -> Callable:
    """The model inside runs as an OpenVINO graph. optimum, which their own OpenVINO backend loads it by, asks for an
    older transformers."""
    from sentence_transformers import SentenceTransformer
    from transformers.modeling_outputs import BaseModelOutput

    from . import peers
    from .checkpoints import minilm

    model = SentenceTransformer(str(minilm()), device="cpu")
    batches = [model.preprocess(sentences[i : i + 32]) for i in (0, 32) if i < len(sentences)]
    inputs = peers.EncoderInputs(minilm(), [(batch["input_ids"], batch["attention_mask"]) for batch in batches])
    run = peers.openvino_forward(inputs, **options)

    def forward(input_ids, attention_mask, **_):
        return BaseModelOutput(last_hidden_state=run(input_ids, attention_mask))

    model[0].model.forward = forward
    return partial(model.encode, sentences, convert_to_tensor=True, show_progress_bar=False)


def _sentences(tiny: bool) -> list[str]:
    from transformer_fast.demo.checkpoint import load_sentences

    return load_sentences()[: 4 if tiny else None]


def sentence_cases(device: str) -> list[Case]:
    if device != "cpu":
        return []
    needs: tuple[str, ...] = ("sentence_transformers", "transformers")
    low = {"low_precision": True}
    graph, foreign = ("openvino", *needs), {"works_on": ("cpu",), "settle": 0.25}
    return [
        Case(
            name="sentence-transformers/minilm-encode",
            title="SentenceTransformer.encode, all-MiniLM-L6-v2 on the demo's real sentences",
            inputs=_sentences,
            candidates=(
                Candidate(OURS, partial(_encode, fast=True), needs),
                Candidate(f"{OURS} bf16", partial(_encode, fast=True, dtype=torch.bfloat16), needs, **low),
                Candidate(f"{OURS} int8", partial(_encode, fast=True, precision="int8"), needs, **low),
                Candidate(THEIRS, _encode, needs),
                Candidate(f"{THEIRS} bf16", partial(_encode, dtype=torch.bfloat16), needs, **low),
                Candidate(f"{THEIRS} on OpenVINO", _openvino, graph, **foreign),
                Candidate(f"{THEIRS} on OpenVINO bf16", partial(_openvino, precision="bf16"), graph, **foreign, **low),
                Candidate(
                    f"{THEIRS} on OpenVINO int8 (nncf)",
                    partial(_openvino, int8=True),
                    ("nncf", *graph),
                    **foreign,
                    **low,
                ),
            ),
            peer=THEIRS,
            dtype="fp32",
            shape="the demo's sentences, batches of 32",
            bar=Bar(2.4, ahead_of=(f"{THEIRS} on OpenVINO",)),
        )
    ]
