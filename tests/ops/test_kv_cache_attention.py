"""Decoding with a preallocated cache to which the same call appends: plain PyTorch, the CPU kernels and Triton."""

import contextlib

import pytest
import torch
import triton_interpreter
from kv_cache_cases import CASES, check, inputs

import transformer_fast as tf
from transformer_fast.backends import native


def _backend(name, device):
    if name == "triton" and device == "cpu":
        return triton_interpreter.active()
    if name == "cpu" and (device != "cpu" or native.load()):
        pytest.skip(native.load() or "the CPU kernels take CPU tensors")
    return contextlib.nullcontext()


def _check(name, device, dtype, monkeypatch=None, splits=None, **case):
    with _backend(name, device):
        if splits:
            from transformer_fast.backends import triton_attention

            monkeypatch.setattr(triton_attention, "splits_of", lambda *_: splits)
        check(name, device, dtype, **case)


@pytest.mark.quick
@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("name", ["eager", "cpu"])
def test_in_plain_pytorch_and_on_the_cpu(name, case):
    _check(name, "cpu", torch.bfloat16 if len(case) % 2 else torch.float32, **CASES[case])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy warns about infinities in rows that do not take part
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("case", list(CASES))
def test_in_one_launch(case, splits, device, monkeypatch):
    _check("triton", device, torch.bfloat16 if len(case) % 2 else torch.float16, monkeypatch, splits, **CASES[case])


@pytest.mark.quick
def test_steps_in_place_are_attention_over_the_whole():
    q, k, v = (torch.randn(2, 4, 12, 16) for _ in range(3))
    caches = [torch.full((2, 4, 16, 16), torch.nan) for _ in range(2)]
    lengths, steps = torch.zeros(2, dtype=torch.int64), []
    for part in ([0, 5], [5, 6], [6, 12]):
        new = [t[:, :, slice(*part)] for t in (q, k, v)]
        steps.append(tf.kv_cache_attention(*new, *caches, lengths))
        lengths += part[1] - part[0]
    whole = tf.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(torch.cat(steps, 2), whole)


@pytest.mark.quick
def test_its_registration_holds_and_its_mutation_is_seen():
    query, key, value, *caches, lengths = inputs("cpu", torch.float32, d=16)
    caches = [cache.nan_to_num(0.0, 0.0) for cache in caches]
    op = torch.ops.transformer_fast.kv_cache_attention.default
    torch.library.opcheck(op, (query, key, value, *caches, lengths, None, 0, False, 0.25, -1, 0.0))
    assert op._schema.arguments[3].alias_info.is_write and op._schema.arguments[4].alias_info.is_write


@pytest.mark.quick
@pytest.mark.parametrize(
    "change, error, message",
    [
        ({0: lambda t: t.requires_grad_()}, RuntimeError, "no gradient"),
        ({1: lambda t: t[:, :, :0]}, ValueError, "key: wanted batch 2 and 1 new rows"),
        ({3: lambda t: t.half()}, TypeError, "key_cache"),
        ({4: lambda t: t[:, :, :50]}, ValueError, "value_cache: wanted shape"),
        ({5: lambda t: t + 40}, ValueError, r"cache_lengths: wanted values in \[0, 99\]"),
        ({5: lambda t: t.float()}, TypeError, "cache_lengths"),
        ({0: lambda t: t[0]}, ValueError, "query: wanted 4 dimensions"),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = list(inputs("cpu", torch.float32))
    for i, function in change.items():
        arguments[i] = function(arguments[i])
    with pytest.raises(error, match=message):
        tf.kv_cache_attention(*arguments)
