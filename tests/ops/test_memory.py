"""Output memory: large pages are asked for inside a tensor only, and the tensor stays an ordinary one."""

import copy
import pickle

import pytest
import torch

import transformer_fast as tf
from transformer_fast.backends import memory

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("megabytes", [1, 2, 3, 9])
def test_advice_covers_whole_pages_inside_the_tensor(megabytes, monkeypatch):
    asked = []
    monkeypatch.setattr(memory, "_madvise", lambda p, n, advice: asked.append((p.value, n.value, advice)))
    out = memory.empty((megabytes, 1 << 18), torch.float32, torch.device("cpu"))
    if megabytes < 2:
        assert not asked
        return
    for start, size, _ in asked:
        assert start % (2 << 20) == 0 and size % (2 << 20) == 0
        assert out.data_ptr() <= start and start + size <= out.data_ptr() + out.nbytes
    covered = sum(size for _, size, _ in asked)
    assert out.nbytes - covered < 4 << 20


def test_large_outputs_are_ordinary_tensors():
    y = tf.layer_norm(torch.randn(1024, 1024), 1024)
    expected = y.clone()
    assert torch.equal(pickle.loads(pickle.dumps(y)), expected)
    assert torch.equal(copy.deepcopy(y), expected)
    assert torch.equal(copy.copy(y).share_memory_(), expected)
    y = tf.layer_norm(torch.randn(1024, 1024), 1024)
    assert y.resize_(2048, 1024).shape == (2048, 1024)


def test_small_large_and_non_cpu_outputs_are_poisoned(monkeypatch):
    monkeypatch.setattr(memory, "_poison", True)
    assert memory.empty((3,), torch.float32, torch.device("cpu")).isnan().all()
    assert memory.empty((2, 1 << 20), torch.float32, torch.device("cpu")).isnan().all()
    assert memory.empty((3,), torch.float32, torch.device("meta")).shape == (3,)
