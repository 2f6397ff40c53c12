"""Named sizes: attention shapes, widths, true model configurations, and ragged sentence lengths."""

import random
from typing import NamedTuple

__all__ = [
    "ALBERT_BASE", "BERT_BASE", "DEBERTA_BASE", "DISTILBERT_BASE", "ELECTRA_BASE", "MODERNBERT_BASE",
    "MPNET_BASE", "POINTWISE", "ROBERTA_BASE", "TINY", "TINY_BERT", "AppendShape", "AttentionShape", "ragged_lengths",
]  # fmt: skip


class AttentionShape(NamedTuple):
    batch: int
    heads: int
    length: int
    head_dim: int

    @property
    def name(self) -> str:
        return f"b{self.batch}-s{self.length}" + (f"-d{self.head_dim}" if self.head_dim != 64 else "")


class AppendShape(NamedTuple):
    """length new tokens of each sequence behind `cached` ones."""

    batch: int
    heads: int
    key_heads: int
    length: int
    cached: int
    head_dim: int

    @property
    def name(self) -> str:
        return f"b{self.batch}-s{self.length}-cached{self.cached}"


# BERT-base's heads, from many short sequences to one long one.
ATTENTION_CPU = [AttentionShape(8, 12, 128, 64), AttentionShape(8, 12, 512, 64), AttentionShape(1, 12, 2048, 64)]
TOKENS, HIDDEN = 16384, 2048  # as attention papers measure
ATTENTION_CUDA = [
    AttentionShape(TOKENS // length, HIDDEN // head_dim, length, head_dim)
    for head_dim in (64, 128)
    for length in (512, 1024, 2048, 4096, 8192, 16384)
]

PADDED_CUDA = [AttentionShape(TOKENS // length, 12, length, 64) for length in (128, 256, 512)]
T5_CUDA = [AttentionShape(TOKENS // length, 12, length, 64) for length in (512, 1024, 2048, 4096)]
DROPOUT_CUDA = [AttentionShape(TOKENS // length, 16, length, 64) for length in (512, 2048)]
DECODE_CUDA = [(batch, context) for batch in (1, 8, 64) for context in (128, 1024, 4096)]  # (sequences, tokens)

POINTWISE = (4096, 768)  # (rows, width): 32 sentences of 128 tokens in BERT-base
NORM_CUDA = [(4096, 768), (32768, 768), (32768, 1024), (32768, 4096), (32768, 8192)]
# Qwen3-0.6B: the feed-forward's activations (rows, width), and the heads of a decoding step and of a prompt.
GATED_CPU, GATED_CUDA = [(1024, 3072)], [(16384, 3072)]
APPEND_CPU = [AppendShape(8, 16, 8, 1, 1024, 128), AppendShape(1, 16, 8, 512, 0, 128)]
APPEND_CUDA = [AppendShape(64, 16, 8, 1, 1024, 128), AppendShape(8, 16, 8, 1024, 0, 128)]
LOSS_CUDA = [(4096, 32128), (4096, 128256)]  # (rows, classes)

BERT_BASE = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "position_embedding_type": "absolute",  # CTranslate2's converter reads it
}
BERT_LARGE = {
    **BERT_BASE, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
}  # fmt: skip
TINY_BERT = {**BERT_BASE, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 128}

DISTILBERT_BASE = {"vocab_size": 30522, "dim": 768, "n_layers": 6, "n_heads": 12, "hidden_dim": 3072}
ALBERT_BASE = {
    "vocab_size": 30522,
    "embedding_size": 128,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu_new",
}
_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
ROBERTA_BASE = {
    **_BASE, "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5,
}  # fmt: skip
ELECTRA_BASE = {**_BASE, "vocab_size": 30522, "embedding_size": 768}
MPNET_BASE = {**_BASE, "vocab_size": 30527, "max_position_embeddings": 514, "layer_norm_eps": 1e-5}
MODERNBERT_BASE = {**_BASE, "vocab_size": 50368, "num_hidden_layers": 22, "intermediate_size": 1152}
DEBERTA_BASE = {  # v3
    **_BASE, "vocab_size": 128100, "relative_attention": True, "position_buckets": 256, "norm_rel_ebd": "layer_norm",
    "share_att_key": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "type_vocab_size": 0,
}  # fmt: skip
_SMALL = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 128}
TINY = {
    "Roberta": {**ROBERTA_BASE, **_SMALL},
    "Electra": {**ELECTRA_BASE, **_SMALL, "embedding_size": 32},
    "MPNet": {**MPNET_BASE, **_SMALL},
    "DistilBert": {"vocab_size": 30522, "dim": 64, "n_layers": 1, "n_heads": 1, "hidden_dim": 128},
    "Albert": {**ALBERT_BASE, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1,
               "intermediate_size": 128},
    "ModernBert": {**MODERNBERT_BASE, **_SMALL, "num_hidden_layers": 2},
    "DebertaV2": {**DEBERTA_BASE, **_SMALL},
}  # fmt: skip


def ragged_lengths(count: int, mean: int = 40, longest: int = 128, seed: int = 0) -> list[int]:
    """Token counts like those of real sentences: a gamma distribution (shape 2), at least 4, the longest present.

    The mean is exact, so that the amount of work is the same for every seed.
    """
    draw = random.Random(seed)
    lengths = [longest] + [min(longest, max(4, round(draw.gammavariate(2.0, mean / 2)))) for _ in range(count - 1)]
    excess = sum(lengths) - mean * count
    while excess:
        i = draw.randrange(1, count)
        step = -1 if excess > 0 else 1
        if 4 <= lengths[i] + step <= longest:
            lengths[i] += step
            excess += step
    return lengths
