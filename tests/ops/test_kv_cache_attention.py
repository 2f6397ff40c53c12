"""Decoding on a preallocated cache that the same call extends: plain PyTorch, the CPU kernels and Triton."""

import contextlib

import pytest
import torch
import triton_interpreter
from numerics import OUTPUT, assert_as_accurate

import transformer_fast as tf
from transformer_fast.backends import native

CASES = {
    "one_token": {},
    "grouped_heads": {"h": 8, "hk": 2},
    "several_tokens": {"n": 5, "h": 4, "hk": 2},
    "window": {"n": 3, "window": (20, 0)},
    "softcap": {"softcap": 3.0},
    "relative_bias": {"n": 2, "buckets": 8},
    "more_tokens_than_the_decoding_kernel_takes": {"n": 20},
    "into_an_empty_cache": {"lengths": (0, 0), "n": 4},
    "to_the_last_row": {"lengths": (95, 60), "n": 5},
}


def _backend(name, device):
    if name == "triton" and device == "cpu":
        return triton_interpreter.active()
    if name == "cpu" and (device != "cpu" or native.load()):
        pytest.skip(native.load() or "the CPU kernels take CPU tensors")
    return contextlib.nullcontext()


def _inputs(device, dtype, h=2, hk=2, n=1, d=40, capacity=100, lengths=(37, 64)):
    def data(heads, rows):
        return torch.randn(2, rows, heads, d, device=device).to(dtype).transpose(1, 2)

    caches = [data(hk, capacity) for _ in range(2)]
    lengths = torch.tensor(lengths, device=device)
    for cache in caches:  # what lies behind the rows in use must not matter
        for b, length in enumerate(lengths.tolist()):
            cache[b, :, length + n :] = torch.nan
            cache[b, :, length : length + n] = torch.inf
    return data(h, n), data(hk, n), data(hk, n), *caches, lengths


def _by_hand(query, key, value, key_cache, value_cache, lengths, dtype, **more):
    """(out, lse, caches): row by row, one attention call each, in plain PyTorch."""
    n = query.shape[2]
    caches = [key_cache.clone(), value_cache.clone()]
    found = []
    for b, length in enumerate(lengths.tolist()):
        for cache, new in zip(caches, (key, value)):
            cache[b, :, length : length + n] = new[b]
        with tf.backend("eager"):
            kv = [cache[b : b + 1, :, : length + n].to(dtype) for cache in caches]
            found.append(tf.scaled_dot_product_attention(
                query[b : b + 1].to(dtype), *kv, is_causal=True, causal_alignment="bottom_right", enable_gqa=True,
                return_lse=True, **more,
            ))  # fmt: skip
    return torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found]), caches


def _check(name, device, dtype, monkeypatch=None, splits=None, **case):
    case = dict(case)
    more = {key: case.pop(key) for key in ("window", "softcap") if key in case}
    if "buckets" in case:
        more["relative_bias"] = tf.RelativeBias(torch.randn(case.pop("buckets"), 2, device=device), 20, False)
    inputs = _inputs(device, dtype, **case)
    query, key, value, *caches, lengths = inputs
    truth, plain = (_by_hand(*inputs, dtype=t, **more) for t in (torch.float64, dtype))
    filled = [cache.clone() for cache in caches]
    with _backend(name, device):
        if splits:
            from transformer_fast.backends import triton_attention

            monkeypatch.setattr(triton_attention, "splits_of", lambda *_: splits)
        with tf.backend(name):
            out, lse = tf.kv_cache_attention(query, key, value, *filled, lengths, return_lse=True, **more)
    assert_as_accurate(out, truth[0], plain[0], OUTPUT, "out")
    assert_as_accurate(lse, truth[1], plain[1], OUTPUT, "lse")
    for ours, theirs in zip(filled, truth[2]):
        assert torch.equal(ours.nan_to_num(-7.0), theirs.nan_to_num(-7.0))


@pytest.mark.quick
@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("name", ["eager", "cpu"])
def test_in_plain_pytorch_and_on_the_cpu(name, case):
    _check(name, "cpu", torch.bfloat16 if len(case) % 2 else torch.float32, **CASES[case])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities in rows that do not take part
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
    query, key, value, *caches, lengths = _inputs("cpu", torch.float32, d=16)
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
    inputs = list(_inputs("cpu", torch.float32))
    for i, function in change.items():
        inputs[i] = function(inputs[i])
    with pytest.raises(error, match=message):
        tf.kv_cache_attention(*inputs)
