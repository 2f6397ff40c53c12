"""The native ops name their arguments like the fields of the specs in backends/specs.py."""

import pytest
import torch

from transformer_fast.backends import native, specs

# The native ops get the relative bias at each distance, not the table and the parameters of its buckets.
_TABLE = {"relative_max_distance", "relative_bidirectional"}
ATTENTION = [name for name in specs.AttentionSpec._fields if name not in _TABLE]
OPS = {
    "cpu_attention_forward": ATTENTION,
    "cpu_attention_backward": ATTENTION,
    "cuda_attention_forward": ATTENTION,
    "cuda_attention_backward": ATTENTION,
    "cuda_attention_decode": ATTENTION,
    "cpu_norm_forward": specs.NormSpec._fields,
    "cuda_norm_forward": specs.NormSpec._fields,
    "cpu_cross_entropy_forward": specs.CrossEntropySpec._fields,
    "cpu_additive_attention_forward": specs.AdditiveAttentionSpec._fields,
    "cpu_embedding_layer_norm_forward": [name for name in specs.EmbeddingSpec._fields if name != "padding_idx"],
}


@pytest.mark.skipif(bool(native.load()), reason=f"no native library: {native.load()}")
@pytest.mark.parametrize("op", OPS)
def test_arguments_are_the_fields_of_the_spec(op):
    wanted = list(OPS[op])
    names = [argument.name for argument in getattr(torch.ops.transformer_fast, op).default._schema.arguments]
    start = names.index(wanted[0])
    assert names[start : start + len(wanted)] == wanted
