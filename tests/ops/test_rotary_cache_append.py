"""Rotation, head norms and the append to a cache in one call: every backend is compared with plain PyTorch in float64,
and that with transformers. Also the properties that callers rely on."""

import contextlib

import cuda_emulator
import pytest
import rotary_cases
import torch
import triton_interpreter
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import running_on
from numerics import assert_as_accurate

import transformer_fast as tf
from transformer_fast.backends import native

B, CAPACITY, LENGTHS = 2, 13, (3, 9)
CASES = {
    "one token": {},
    "grouped heads, norms": {"h": 6, "hk": 2, "norms": (True, True)},
    "a part of the columns, several tokens": {"n": 3, "half": 5, "norms": (False, True), "placed": True},
    "interleaved": {"n": 2, "interleaved": True, "norms": (True, True), "half": 3, "placed": True},
    "every column, to the last row": {"n": 4, "d": 16, "norms": (True, False)},
    "Qwen 3's heads": {"h": 4, "d": 128, "norms": (True, True)},
}
BACKENDS = ["eager", "cpu", "triton", "cuda"]


def inputs(device, dtype, h=2, hk=2, n=1, d=14, half=None, norms=(False, False), placed=False, interleaved=False,
           layout="heads first", length_dtype=torch.int32):  # fmt: skip
    """layout: of query, key, value and caches, see rotary_cases.strided."""

    def data(heads, rows):
        return rotary_cases.strided((B, rows, heads, d), dtype, layout, device).transpose(1, 2)

    caches = [torch.full_like(data(hk, CAPACITY), torch.nan) for _ in range(2)]
    lengths = torch.tensor(LENGTHS, device=device, dtype=length_dtype)
    cos, sin = rotary_cases.tables(CAPACITY + 5, d // 2 if half is None else half, device)
    positions = torch.randint(0, CAPACITY + 5, (B, n), device=device) if placed else None
    weights = [torch.rand(d, device=device) + 0.5 if norm else None for norm in norms]
    more = {"query_weight": weights[0], "key_weight": weights[1], "interleaved": interleaved}
    return [data(h, n), data(hk, n), data(hk, n), *caches, lengths, cos, sin, positions], more


def run(arguments, more, dtype=None):
    """The queries, and the caches after the call."""
    call = [t.clone() if t is not None else None for t in arguments]
    if dtype is not None:
        call[:5] = [t.to(dtype) for t in call[:5]]
    with torch.no_grad():
        return [tf.rotary_cache_append(*call, **more), *call[3:5]]


@contextlib.contextmanager
def using(name, device):
    if name == "cpu" and (device != "cpu" or native.load()):
        pytest.skip(native.load() or "the CPU kernels take CPU tensors")
    machine = {"triton": triton_interpreter, "cuda": cuda_emulator}.get(name) if device == "cpu" else None
    with machine.active() if machine else contextlib.nullcontext(), tf.backend(name):
        yield


def check(arguments, more, name, device):
    new = arguments[0].shape[2]
    with tf.backend("eager"):
        truth, plain = run(arguments, more, torch.float64), run(arguments, more)
    with using(name, device):
        ours = run(arguments, more)
    assert_as_accurate(ours[0], truth[0], plain[0], name="queries")
    for i, what in ((1, "keys"), (2, "values")):
        written = [torch.cat([t[i][b, :, n : n + new] for b, n in enumerate(LENGTHS)]) for t in (ours, truth, plain)]
        assert_as_accurate(*written, name=what)
        unchanged = [t[i].isnan().to(t[i].dtype) for t in (ours, truth, plain)]
        assert_as_accurate(*unchanged, name=f"which {what} are written")


@pytest.mark.quick
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", BACKENDS)
def test_against_float64(name, case, device):
    for dtype in (torch.float32, torch.bfloat16):
        check(*inputs(device, dtype, **CASES[case]), name, device)


@st.composite
def calls(draw):
    width, key_heads = draw(st.integers(1, 70) | st.sampled_from([64, 128, 256])), draw(st.integers(1, 3))
    return draw(st.sampled_from(rotary_cases.DTYPES)), {
        "h": key_heads * draw(st.integers(1, 3)),
        "hk": key_heads,
        "n": draw(st.integers(1, 4)),
        "d": width,
        "half": draw(st.sampled_from([width // 2, width // 4, 0, min(1, width // 2)])),
        "norms": (draw(st.booleans()), draw(st.booleans())),
        "placed": draw(st.booleans()),
        "interleaved": draw(st.booleans()),
        "layout": draw(st.sampled_from([w for w in rotary_cases.LAYOUTS if w != "expanded"])),
        "length_dtype": draw(st.sampled_from([torch.int32, torch.int64])),
    }


ISAS = [] if native.load() else native.supported_isas()


@pytest.mark.parametrize("name, isa", [*(("cpu", isa) for isa in ISAS), ("triton", ""), ("cuda", "")])
def test_drawn_calls(name, isa, device):
    @settings(max_examples=40 if name == "cpu" else 15, deadline=None, derandomize=True)
    @given(call=calls())
    def drawn(call):
        dtype, features = call
        check(*inputs(device, dtype, **features), name, device)

    with running_on(isa) if isa else contextlib.nullcontext():
        drawn()


def test_is_what_transformers_computes():
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

    arguments, more = inputs("cpu", torch.float32, h=4, hk=2, n=2, d=16, norms=(True, True))
    query, key, value, _, _, lengths, cos, sin, _ = arguments
    norms = []
    for weight in (more["query_weight"], more["key_weight"]):
        norms.append(Qwen3RMSNorm(16, eps=1e-6))
        norms[-1].weight.data = weight
    places = lengths[:, None].long() + torch.arange(2)
    wide = [torch.cat((t, t), -1)[places] for t in (cos, sin)]
    with torch.no_grad():
        q, k = apply_rotary_pos_emb(norms[0](query), norms[1](key), *wide)
    with tf.backend("eager"):
        found, keys, values = run(arguments, more)
    torch.testing.assert_close(found, q)
    for b, n in enumerate(LENGTHS):
        torch.testing.assert_close(keys[b, :, n : n + 2], k[b])
        assert torch.equal(values[b, :, n : n + 2], value[b])


def test_opcheck_and_one_graph_of_any_shape():
    arguments, more = inputs("cpu", torch.float32, norms=(True, True))
    arguments[3:5] = [t.nan_to_num() for t in arguments[3:5]]
    op = torch.ops.transformer_fast.rotary_cache_append.default
    torch.library.opcheck(op, (*arguments, more["query_weight"], more["key_weight"], 1e-6, False))
    assert op._schema.arguments[3].alias_info.is_write and op._schema.arguments[4].alias_info.is_write
    compiled = torch.compile(tf.rotary_cache_append, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (2, 3):
        arguments, more = inputs("cpu", torch.float32, n=n, norms=(True, True))
        call = [None if t is None else t.clone() for t in arguments]
        with torch.no_grad():
            found = [compiled(*call, **more), *call[3:5]]
        for ours, wanted in zip(found, run(arguments, more)):
            torch.testing.assert_close(ours, wanted, equal_nan=True)


@pytest.mark.quick
@pytest.mark.skipif(bool(native.load()), reason=native.load() or "there")
def test_the_kernel_looks_at_what_a_graph_hides():
    """A compiled graph cannot check values, so the kernel itself must stay within its tables and caches."""
    compiled = torch.compile(tf.rotary_cache_append, fullgraph=True, backend="aot_eager")
    cases = (
        (lambda t: t + 4, (5,), r"cache_lengths: wanted values in \[0, 12\], got 13"),
        (lambda t: t - 4, (5,), r"cache_lengths.*got -1"),
        (lambda t: t[:9], (6, 7), r"cos: wanted rows in \[0, 9\), got 9"),
        (lambda t: torch.tensor([[0], [18]]), (8,), r"positions.*\[0, 18\), got 18"),
    )
    for change, places, message in cases:
        arguments, more = inputs("cpu", torch.float32)
        for i in places:
            arguments[i] = change(arguments[i])
        with torch.no_grad(), pytest.raises(RuntimeError, match=message):
            compiled(*arguments, **more)


BAD = {
    "gradient": ({0: lambda t: t.requires_grad_()}, {}, RuntimeError, "no gradient"),
    "rank": ({0: lambda t: t[0]}, {}, ValueError, "query: wanted 4 dimensions"),
    "new rows": ({1: lambda t: t[:, :, :0]}, {}, ValueError, "key: wanted batch 2 and 1 new rows"),
    "cache dtype": ({3: lambda t: t.half()}, {}, TypeError, "key_cache"),
    "capacities": ({4: lambda t: t[:, :, :5]}, {}, ValueError, "value_cache: wanted shape"),
    "lengths": ({5: lambda t: t + 4}, {}, ValueError, r"cache_lengths: wanted values in \[0, 12\]"),
    "short table": ({6: lambda t: t[:9], 7: lambda t: t[:9]}, {}, ValueError, "cos: wanted a row for each of the 10"),
    "positions": ({8: lambda t: torch.tensor([18])}, {}, ValueError, r"positions: wanted values in \[0, 18\)"),
    "weight": ({}, {"key_weight": torch.ones(3)}, ValueError, r"key_weight: wanted shape \(14,\), got \(3,\)"),
    "eps": ({}, {"eps": -1.0}, ValueError, "eps: wanted"),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    changes, more, error, message = BAD[name]
    arguments, _ = inputs("cpu", torch.float32)
    for i, change in changes.items():
        arguments[i] = change(arguments[i])
    with pytest.raises(error, match=message):
        tf.rotary_cache_append(*arguments, **more)
