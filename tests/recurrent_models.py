"""Small recurrent encoder-decoders of every kind, and batches for them."""

import itertools

import torch

import transformer_fast as tf
from transformer_fast.models.rnn import SCORES

__all__ = ["KINDS", "LENGTHS", "batch", "build"]

SETTINGS = {
    "no feeding": {"attention": "dot", "input_feeding": False},
    "additive after": {"attention": "additive", "attention_placing": "after"},
    "general before": {"attention": "general", "attention_placing": "before"},
    "peeky": {"attention": "none", "context": "every_step"},
}
KINDS = [
    *itertools.product(SCORES, ("gru", "lstm")), ("no feeding", "gru"), ("additive after", "lstm"),
    ("general before", "gru"), ("none", "lstm"), ("none", "gru"), ("peeky", "gru"), ("peeky", "lstm"),
]  # fmt: skip
LENGTHS = (7, 3, 1, 5)


def build(kind="additive", cell="gru", **settings):
    torch.manual_seed(1)
    defaults = {
        "vocab_size": 37, "encoder_vocab_size": 43, "embedding_size": 20, "hidden_size": 24, "num_layers": 2,
        "attention_size": 18, "cell": cell, "initializer_range": 0.3, **SETTINGS.get(kind, {"attention": kind}),
    }  # fmt: skip
    config = tf.AttentionRNNConfig(**{**defaults, **settings})
    return tf.AttentionRNNForConditionalGeneration(config).eval()


def batch(padding="right", lengths=LENGTHS, targets=6):
    g = torch.Generator().manual_seed(3)
    longest = max(lengths)
    ids = torch.randint(3, 43, (len(lengths), longest), generator=g)
    position, length = torch.arange(longest), torch.tensor(lengths)[:, None]
    mask = (position < length) if padding == "right" else (position >= longest - length)
    labels = torch.randint(3, 37, (len(lengths), targets), generator=g)
    labels[1, -2:] = -100
    return {"input_ids": ids * mask, "attention_mask": mask.long(), "labels": labels}
