"""Fine-tuning a decoder on documents of many lengths: concatenated into one row by DataCollatorWithFlattening, by
import, accelerate() and attn_implementation, against Hugging Face's padded batch."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

import transformer_fast as tf

from . import shapes
from .case import OURS, Bar, Candidate, Case
from .generation_cases import checkpoint
from .model_cases import HF_SDPA, optimizer_step, random_batch

__all__ = ["packed_cases"]

MODEL = "smollm-135m"


class PackedInputs(NamedTuple):
    """The same documents in one row and padded, as keywords of a forward."""

    checkpoint: object
    padded: dict[str, torch.Tensor]
    packed: dict[str, torch.Tensor]


def packed_cases(device: str) -> list[Case]:
    if device != "cpu":
        return []
    lengths = shapes.ragged_lengths(16)

    def inputs(tiny: bool) -> PackedInputs:
        from transformers import DataCollatorWithFlattening

        sizes, words = ([5, 3], (10, 90)) if tiny else (lengths, (1000, 30000))
        ids, mask = random_batch(sizes, device, words)
        padded = {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask.bool(), -100)}
        features = [{"input_ids": row[m.bool()].tolist()} for row, m in zip(ids, mask)]
        return PackedInputs(checkpoint(MODEL, tiny), padded, dict(DataCollatorWithFlattening()(features)))

    makes: dict[str, tuple[Callable, bool]] = {
        OURS: (_ours, True),
        HF_SDPA: (_hugging_face, False),
        "HF sdpa, packed": (_hugging_face, True),
        "HF with accelerate(), packed": (_accelerated, True),
        "HF with attn_implementation, packed": (partial(_hugging_face, attention="transformer_fast"), True),
    }
    return [
        Case(
            name=f"training/{MODEL}-packed-16",
            title=f"{MODEL} fine-tuning step, 16 documents (mean 40, max 128) in one row; the peer's are padded",
            inputs=inputs,
            candidates=tuple(
                Candidate(name, partial(_step, make=make, packed=packed), ("transformers",))
                for name, (make, packed) in makes.items()
            ),
            peer=HF_SDPA,
            dtype="fp32",
            shape=f"16 x {max(lengths)}, {sum(lengths)} tokens",
            bar=Bar(2.0),
        )
    ]


def _ours(path: object):
    return tf.LlamaForCausalLM.from_pretrained(path)


def _hugging_face(path: object, attention: str = "sdpa"):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(path, attn_implementation=attention)


def _accelerated(path: object):
    model = _hugging_face(path)
    tf.accelerate(model, verbose=False)
    return model


def _step(inputs: PackedInputs, make: Callable, packed: bool) -> Callable:
    """A training step that returns its loss. All candidates have the same loss: there is no dropout, and the first
    token of a document is not a target."""
    batch = inputs.packed if packed else inputs.padded
    return optimizer_step(make(inputs.checkpoint).train(), batch | {"use_cache": False})
