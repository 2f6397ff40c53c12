"""Attention's memory on a GPU grows with the sequence length, not with its square. An H200 has run it."""

import pytest
import torch

import transformer_fast as tf

LENGTHS = (4096, 16384, 65536)
FEATURES = {
    "causal": {"is_causal": True},
    "dropout": {"dropout_p": 0.1},
    "relative_bias": {},
    "window": {"window": (1024, 1024)},
}


def _peak(length: int, feature: str, backward: bool) -> int:
    """Peak memory in bytes, without the inputs."""
    q, k, v = (
        torch.randn(1, 4, length, 64, device="cuda", dtype=torch.bfloat16, requires_grad=backward) for _ in range(3)
    )
    arguments, leaves = dict(FEATURES[feature]), [q, k, v]
    if feature == "relative_bias":
        leaves.append(torch.randn(32, 4, device="cuda", requires_grad=backward))
        arguments["relative_bias"] = tf.RelativeBias(leaves[3])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with tf.backend("triton"):
        out = tf.scaled_dot_product_attention(q, k, v, **arguments)
        if backward:
            torch.autograd.grad(out, leaves, torch.ones_like(out))
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU on this machine")
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("feature", list(FEATURES))
def test_memory_is_linear_in_the_length(feature, backward):
    _peak(LENGTHS[0], feature, backward)  # warm up: the first call allocates memory that stays
    used = [_peak(length, feature, backward) for length in LENGTHS]
    for shorter, longer in zip(used, used[1:]):
        assert longer <= 4.2 * shorter + 2**20, used  # lengths differ by a factor of 4; allocations are rounded
