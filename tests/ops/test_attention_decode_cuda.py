"""The CUDA decoding kernel against float64: on a GPU if there is one, else under the emulator."""

import contextlib
import math

import cuda_emulator
import kv_cache_cases
import pytest
import torch
from attention_cases import FLOATS, Case, Inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import OUTPUT, assert_as_accurate

import transformer_fast as tf
from transformer_fast.backends import backend, cuda, cuda_attention

_ops = torch.ops.transformer_fast


@pytest.fixture(autouse=True)
def _on_the_device(device, monkeypatch):
    # The backend refuses float32 attention because it does not know the number of queries. This kernel supports it.
    monkeypatch.setitem(cuda._REFUSES, "attention", lambda call: ())
    with contextlib.nullcontext() if device == "cuda" else cuda_emulator.active():
        yield


@contextlib.contextmanager
def _multiprocessors(n):
    """Set the number of multiprocessors of the emulated GPU, which determines the number of splits of the keys."""
    settings = cuda_emulator.library().settings
    before, settings.multiprocessors = settings.multiprocessors, n
    try:
        yield
    finally:
        settings.multiprocessors = before


def _on_device(inputs: Inputs, device: str) -> Inputs:
    return Inputs(**{name: None if t is None else t.to(device) for name, t in vars(inputs).items()})


def _check(device, case: Case, inputs: Inputs | None = None) -> None:
    inputs = _on_device(inputs or case.inputs(), device)

    def run(name, dtype):
        leaves = (inputs.query, inputs.key, inputs.value, inputs.bias, inputs.table)
        with backend(name), torch.no_grad(), torch.device(device):
            return case.forward([None if t is None else t.to(dtype) for t in leaves], inputs.mask)

    results = zip(("out", "lse"), run("cuda", case.dtype), run("eager", torch.float64), run("eager", case.dtype))
    for what, *values in results:
        assert_as_accurate(*values, OUTPUT, f"{what} of {case}")


@pytest.mark.quick
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dim", [64, 80, 128, 200, 256, 33, 1])
def test_head_dims(device, dtype, dim):
    _check(device, Case(2, 4, 4, 1, 150, dim, dtype, lengths=[150, 97]))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("heads, key_heads, queries", [(8, 1, 2), (4, 2, 5), (2, 2, 16), (6, 2, 3)])
def test_rows_that_share_keys(device, dtype, heads, key_heads, queries):
    shape = (2, heads, key_heads, queries, 130, 64, dtype)
    _check(device, Case(*shape, is_causal=True, causal_alignment="bottom_right", lengths=[130, 77]))


@pytest.mark.parametrize("multiprocessors", [1, 4, 16, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_splits(device, dtype, multiprocessors):
    """From one split to one per 64 keys. One sequence has fewer keys than there are splits."""
    if device == "cuda":
        pytest.skip("only the emulator can set the number of multiprocessors")
    with _multiprocessors(multiprocessors):
        _check(device, Case(2, 2, 2, 1, 700, 64, dtype, lengths=[700, 5]))
        _check(device, Case(1, 6, 2, 2, 700, 40, dtype, softcap=5.0, is_causal=True, causal_alignment="bottom_right"))


FEATURES = {
    "causal": {"is_causal": True, "causal_alignment": "bottom_right"},
    "causal_top_left": {"is_causal": True, "queries": 8},
    "window": {"window": (30, 10), "causal_alignment": "bottom_right"},
    "softcap": {"softcap": 4.0},
    "scale": {"scale": -0.3},
    "bias": {"bias_axes": (True, True, True, True)},
    "bias_of_a_row": {"bias_axes": (False, True, False, True)},
    "mask": {"mask_axes": (True, False, True, True)},
    "relative_bias": {"buckets": 8, "causal_alignment": "bottom_right"},
    "unpadded": {"unpadded": True, "lengths": [90, 60], "is_causal": True, "causal_alignment": "bottom_right"},
    "rows_without_keys": {"lengths": [90, 0]},
    "rows_before_the_first_key": {"lengths": [90, 2], "is_causal": True, "causal_alignment": "bottom_right"},
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("feature", list(FEATURES))
def test_features(device, feature, dtype):
    more = {"queries": 4, **FEATURES[feature]}
    queries = more.pop("queries")
    _check(device, Case(2, 4, 2, queries, 90, 64, dtype, **more))


@st.composite
def _cases(draw):
    sampled, chance = st.sampled_from, st.booleans()
    batch, key_heads, groups, keys = draw(st.integers(1, 3)), *draw(sampled([(1, 1), (2, 1), (2, 2), (1, 5)])), 0
    keys = draw(st.integers(20, 200))
    axes = st.none() | st.tuples(*[chance] * 2, st.just(True), st.just(True))
    unpadded = draw(chance)
    lengths = draw(st.none() | st.lists(st.integers(1, keys), min_size=batch, max_size=batch))
    return Case(
        batch, key_heads * groups, key_heads, draw(st.integers(1, 16 // groups)), keys,
        draw(sampled([8, 16, 33, 64, 64, 96, 128, 160])), draw(sampled(FLOATS)), unpadded, lengths,
        is_causal=draw(chance), causal_alignment=draw(sampled(["top_left", "bottom_right"])),
        window=draw(sampled([None, None, (60, 30), (None, 40), (80, None)])), softcap=draw(sampled([0.0, 0.0, 10.0])),
        mask_axes=draw(axes), bias_axes=draw(axes), buckets=draw(sampled([0, 0, 8])), bidirectional=draw(chance),
    )  # fmt: skip


@settings(max_examples=30, deadline=None, derandomize=True)
@given(case=_cases())
def _drawn(device, case):
    _check(device, case)


def test_drawn_cases(device):
    _drawn(device)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dim", [64, 40, 17])
@pytest.mark.parametrize("case", list(kv_cache_cases.CASES))
def test_cache_is_extended_in_place(device, case, dim, dtype):
    if dtype == torch.float32 and "more_tokens" in case:
        pytest.skip("float32 attention of more queries has no CUDA kernel")
    kv_cache_cases.check("cuda", device, dtype, d=dim, **kv_cache_cases.CASES[case])


@pytest.mark.parametrize("multiprocessors", [4, 16])
def test_cache_is_extended_by_the_split_that_reaches_its_end(device, multiprocessors):
    with contextlib.nullcontext() if device == "cuda" else _multiprocessors(multiprocessors):
        for n in (1, 7):
            kv_cache_cases.check("cuda", device, torch.bfloat16, d=64, n=n, capacity=600, lengths=(130, 590))


def test_the_same_bits_every_time(device):
    case = Case(1, 4, 2, 2, 600, 64, torch.bfloat16)
    inputs = _on_device(case.inputs(), device)
    leaves = (inputs.query, inputs.key, inputs.value, None, None)
    with backend("cuda"), torch.no_grad():
        first = case.forward(leaves, None)
        with contextlib.nullcontext() if device == "cuda" else cuda_emulator.active(seed=5):  # another order of warps
            again = case.forward(leaves, None)
    assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.quick
def test_large_scores_do_not_overflow(device):
    case = Case(1, 2, 2, 1, 100, 64)
    inputs = case.inputs()
    inputs.query *= 1e3
    _check(device, case, inputs)


def test_opcheck(device):
    query, key, value, *caches, lengths = kv_cache_cases.inputs(device, torch.bfloat16, d=16)
    caches = [cache.nan_to_num(0.0, 0.0) for cache in caches]
    with tf.backend("cuda"):
        op = torch.ops.transformer_fast.kv_cache_attention.default
        torch.library.opcheck(op, (query, key, value, *caches, lengths, None, 0, False, 0.25, -1, 0.0))


@pytest.mark.quick
@pytest.mark.parametrize(
    "change, message",
    [
        ({"query": (1, 34, 1, 16)}, "more than 16 queries"),
        ({"query": (1, 2, 1, 16), "key": (1, 2, 8, 24)}, r"key: wanted shape \(1, any, any, 16\)"),
        ({"query": (1, 2, 1, 300), "key": (1, 2, 8, 300)}, "query: wanted a head dim of 1 to 256, got 300"),
        ({"new": (1, 2, 2, 16)}, r"new_key: wanted shape \(1, 2, 1, 16\)"),
        ({"lengths": None, "new": (1, 2, 1, 16)}, "new keys need new values and key_lengths"),
    ],
)
def test_bad_input_is_refused_before_launch(device, change, message):
    shapes = {"query": (1, 2, 1, 16), "key": (1, 2, 8, 16), "new": None, "lengths": (1,), **change}
    query, key, value = (torch.randn(shapes[n], device=device) for n in ("query", "key", "key"))
    new = [None if shapes["new"] is None else torch.randn(shapes["new"], device=device) for _ in range(2)]
    lengths = None if shapes["lengths"] is None else torch.zeros(1, dtype=torch.int32, device=device)
    out, lse = torch.empty_like(query), torch.empty(query.shape[:3], device=device)
    with pytest.raises(RuntimeError, match=message):
        _ops.cuda_attention_decode(
            query, key, value, None, None, lengths, None, None, 1, 8, None, None, 0.25, 1, -1, -1, 0.0, 0.0, *new, out,
            lse,
        )  # fmt: skip


def test_dropout_goes_to_another_kernel(device, monkeypatch):
    """The decoding kernel has no dropout, so a call with dropout must not reach it."""
    monkeypatch.setattr(cuda_attention, "_decode", lambda *_: pytest.fail("decoded"))
    query, key = (torch.randn(1, 2, n, 64, device=device).bfloat16() for n in (2, 50))
    with backend("cuda"), torch.no_grad():
        out = tf.scaled_dot_product_attention(query, key, key, dropout_p=0.5)
    assert math.isfinite(out.float().sum().item())
