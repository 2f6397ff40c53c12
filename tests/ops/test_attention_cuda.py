"""The forward pass of the CUDA C++ attention kernels for mma.sync against float64: on a GPU if there is one, else under
the emulator with compute capability 8.0, because on 9.0 a kernel for wgmma comes first."""

import contextlib
import math

import cuda_emulator
import pytest
import torch
from attention_cases import bias_of, draw_features
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import OUTPUT, assert_as_accurate
from remembered_cases import check_repeats

import transformer_fast as tf
from transformer_fast.backends import remembered
from transformer_fast.backends.philox import keep_mask
from transformer_fast.ops import attention

HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _on_the_device(device):
    with contextlib.nullcontext() if device == "cuda" else cuda_emulator.active(compute_capability=80):
        yield


def _call(backend, function, tensors, kw, dtype=None):
    """out and lse, with dropout from a fixed seed."""
    data = [t.to(dtype or t.dtype) for t in tensors]
    kw = dict(kw)
    if kw.get("bias") is not None:
        kw["bias"] = kw["bias"].to(dtype or kw["bias"].dtype)
    if "relative" in kw:
        table, *rest = kw.pop("relative")
        kw["relative_bias"] = tf.RelativeBias(table.to(dtype or table.dtype), *rest)
    torch.manual_seed(11)
    with torch.no_grad(), tf.backend(backend):
        return function(*data, return_lse=True, **kw)


def _check(function, tensors, kw):
    ours = _call("cuda", function, tensors, kw)
    truth = _call("eager", function, tensors, kw, torch.float64)
    eager = _call("eager", function, tensors, kw)
    for name, *results in zip(("out", "lse"), ours, truth, eager):
        assert_as_accurate(*results, OUTPUT, name)
    return ours


def _padded(device, dtype, b=2, h=2, hk=None, sq=24, sk=40, d=32, **kw):
    """Check a call on random (B, H, S, D) tensors with memory layout (B, S, H, D) against float64."""
    hk = hk or h
    kw = {n: v(b, h, sq, sk) if callable(v) else v for n, v in kw.items()}
    if hk != h:
        kw["enable_gqa"] = True
    tensors = [
        torch.randn(b, s, n, d, device=device).to(dtype).transpose(1, 2) for n, s in ((h, sq), (hk, sk), (hk, sk))
    ]
    return _check(tf.scaled_dot_product_attention, tensors, kw)


CASES = {
    "plain": {},
    "causal": {"is_causal": True},
    "bottom_right": {"is_causal": True, "causal_alignment": "bottom_right"},
    "window": {"window": (7, 3)},
    "window_left_of_bottom_right": {"window": (5, None), "causal_alignment": "bottom_right"},
    "more_queries_than_keys": {"sq": 40, "sk": 20, "is_causal": True, "causal_alignment": "bottom_right"},
    "one_row_one_key": {"sq": 1, "sk": 1},
    "odd_head_dim": {"d": 37},
    "softcap": {"softcap": 2.5},
    "grouped_heads": {"h": 4, "hk": 2, "is_causal": True},
    "negative_scale": {"scale": -0.3},
    "zero_scale": {"scale": 0.0},
}  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("case", list(CASES))
def test_padded(case, device):
    _padded(device, HALF[len(case) % 2], **CASES[case])


# Several tiles of queries and keys, with partial tiles at the ends, for every class of head dims.
@pytest.mark.parametrize("rich", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d", [8, 32, 48, 64, 80, 96, 128, 136, 256])
def test_head_dims(d, causal, rich, device):
    kw = {"softcap": 20.0} if rich else {}
    _padded(device, HALF[d // 8 % 2], b=1, sq=203, sk=277, d=d, is_causal=causal, **kw)


def test_where_shared_memory_is_100_kb(device):
    if device == "cuda":
        pytest.skip("this sets an option of the emulator")
    with cuda_emulator.active(compute_capability=120):
        for causal in (False, True):
            _padded(device, torch.bfloat16, b=1, sq=150, sk=200, d=128, is_causal=causal)


def test_copies_at_once(device):
    """Asynchronous copies complete as early as possible here; in the other tests as late as allowed."""
    if device == "cuda":
        pytest.skip("this sets an option of the emulator")
    with cuda_emulator.active(late=False, seed=3, compute_capability=80):
        _padded(device, torch.bfloat16, b=1, sq=150, sk=200, d=64)
        _padded(device, torch.bfloat16, b=1, sq=150, sk=200, d=40, dropout_p=0.2, is_causal=True)


def test_shared_memory_has_no_bank_conflicts(device):
    if device == "cuda":
        pytest.skip("only the emulator counts bank conflicts")
    library = cuda_emulator.library()
    library.reset_counters()
    for d in (32, 64, 96, 128, 256):
        _padded(device, torch.bfloat16, b=1, h=1, sq=20, sk=70, d=d)
        _padded(device, torch.bfloat16, b=1, h=1, sq=20, sk=70, d=d, softcap=3.0)
    counters = library.counters()
    assert counters["ldmatrix"] > 0 and counters["ldmatrix_conflicts"] == 0


@pytest.mark.parametrize("axes", ["bhmn", "hmn", "bn", "m", "bm", "n", ""])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bias(axes, dtype, device):
    data = torch.bfloat16 if dtype == torch.float32 else dtype
    _padded(device, data, sq=20, sk=77, bias=bias_of(axes, dtype, device))


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("d", [32, 80])
def test_relative_bias(d, bidirectional, device):
    """Key blocks within the reach, across it, and beyond it on both sides."""
    table = torch.randn(8, 2, device=device)
    kw = {"relative": (table, 12, bidirectional), "is_causal": not bidirectional}
    _padded(device, torch.float16, b=1, sq=150, sk=170, d=d, **kw)


@pytest.mark.parametrize("axes", ["bhmn", "bn", "m", "hm"])
def test_mask(axes, device):
    def mask(b, h, sq, sk):
        return torch.rand([n if a in axes else 1 for a, n in zip("bhmn", (b, h, sq, sk))], device=device) > 0.4

    _padded(device, torch.bfloat16, sq=40, sk=100, attn_mask=mask)


def test_lengths_masks_and_minus_infinity(device):
    lengths = torch.tensor([17, 0], device=device)
    mask = torch.rand(2, 1, 24, 40, device=device) > 0.5
    mask[0, 0, 3] = False
    bias = torch.randn(2, 1, 24, 40, device=device).bfloat16()
    bias[:, :, 5:9] = -math.inf
    out, lse = _padded(device, torch.bfloat16, key_lengths=lengths, attn_mask=mask, bias=bias)
    assert lse[1].eq(-math.inf).all() and out[1].eq(0).all() and out[0, :, [3, 6]].eq(0).all()


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_what_lies_past_the_keys_is_never_read(softcap, device):
    q, k, v = (torch.randn(2, 2, s, 32, device=device).half() for s in (24, 90, 90))
    lengths = torch.tensor([17, 73], device=device)
    outputs = []
    for garbage in (0.0, math.nan):
        for b, n in enumerate(lengths.tolist()):
            k[b, :, n:], v[b, :, n:] = garbage, garbage
        with tf.backend("cuda"):
            outputs.append(tf.scaled_dot_product_attention(q, k, v, key_lengths=lengths, softcap=softcap))
    assert torch.equal(*outputs)


def test_nan_is_not_hidden(device):
    q, k, v = (torch.randn(1, 1, s, 64, device=device).half() for s in (24, 90, 90))
    q[0, 0, 5, 3] = math.nan
    with tf.backend("cuda"):
        out = tf.scaled_dot_product_attention(q, k, v)
    assert out[0, 0, 5].isnan().all() and not out[0, 0, [4, 6]].isnan().any()


def test_one_huge_logit(device):
    q, k, v = (torch.randn(1, 1, 40, 32, device=device).half() for _ in range(3))
    q[0, 0, 5], k[0, 0, 33] = 30.0, 30.0
    _check(tf.scaled_dot_product_attention, [q, k, v], {})


def _view(layout, s, d, device):
    """A (2, 3, s, d) tensor whose rows are not aligned to 16 bytes, or are 2^30 elements apart."""
    if layout == "offset":
        return torch.randn(2 * 3 * s * d + 1, device=device).half()[1:].view(2, 3, s, d)
    if layout == "stride":
        return torch.randn(2, 3, s, d + 3, device=device).half()[..., :d]
    return torch.randn(2, 3, d, s, device=device).half().transpose(2, 3)  # ops/ makes its last axis contiguous


@pytest.mark.parametrize("layout", ["offset", "stride", "transposed"])
@pytest.mark.parametrize("d", [16, 33, 128, 250])
def test_rows_that_are_not_aligned(layout, d, device):
    _check(tf.scaled_dot_product_attention, [_view(layout, s, d, device) for s in (30, 50, 50)], {"is_causal": True})


def test_strides_past_32_bits(device):
    """Rows 2^30 elements apart: offsets within one tile need 64 bits."""
    if device == "cuda":
        pytest.skip("needs 6 GiB of GPU memory per tensor; the emulator checks the address arithmetic")
    step, far = 2**30, []
    for _ in range(3):
        memory = torch.empty(2 * step + 16, dtype=torch.float16)  # untouched pages cost nothing
        far.append(memory.as_strided((1, 1, 3, 16), (0, 0, step, 1)).copy_(torch.randn(1, 1, 3, 16)))
    close = [t.clone(memory_format=torch.contiguous_format) for t in far]
    for p in (0.0, 0.1):
        results = [_call("cuda", tf.scaled_dot_product_attention, t, {"dropout_p": p})[0] for t in (far, close)]
        assert torch.equal(*results)


@pytest.mark.parametrize("d", [64, 128, 256])
def test_dropout_mask_bit_for_bit(d, device):
    b, h, sq, sk, p = 1, 2, 40, 300, 0.3
    q, k = torch.randn(b, h, sq, d, device=device).half(), torch.randn(b, h, sk, d, device=device).half()
    torch.manual_seed(5)
    rng = torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=device)
    kept = []
    for first in range(0, sk, d):  # values that name the column: out is P, or zero where it was dropped
        v = torch.zeros(b, h, sk, d, device=device).half()
        columns = torch.arange(first, min(first + d, sk), device=device)
        v[:, :, columns, columns - first] = 1
        torch.manual_seed(5)
        with tf.backend("cuda"):
            out = tf.scaled_dot_product_attention(q, k, v, dropout_p=p, scale=0.01)
        kept.append(out[..., : len(columns)] != 0)
    i, j = torch.arange(sq, device=device)[:, None], torch.arange(sk, device=device)[None]
    wanted = keep_mask(rng, p, torch.arange(b * h, device=device)[:, None, None], i[None], j[None])
    assert torch.equal(torch.cat(kept, -1), wanted.view(b, h, sq, sk))


@pytest.mark.parametrize("causal", [False, True])
def test_dropout(causal, device):
    _padded(device, torch.float16, b=1, sq=24, sk=150, dropout_p=0.25, is_causal=causal)


@pytest.mark.parametrize("rich", [False, True])
def test_unpadded(rich, device):
    """Sequences of different lengths, including an empty one and one without keys."""
    cu_q = torch.tensor([0, 20, 20, 53, 58, 200], device=device)
    cu_k = torch.tensor([0, 33, 40, 40, 45, 190], device=device)
    tensors = [torch.randn(n, h, 32, device=device).bfloat16() for n, h in ((200, 4), (190, 2), (190, 2))]
    kw = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "is_causal": True, "causal_alignment": "bottom_right"}
    if rich:
        kw |= {"dropout_p": 0.2, "bias": torch.randn(4, 1, 142, 145, device=device).bfloat16()[:1]}
        kw |= {"relative": (torch.randn(8, 4, device=device), 20, True)}
    _check(tf.varlen_attention, tensors, kw)


@pytest.mark.parametrize("dtype", HALF)
def test_opcheck(dtype, device):
    q, k = torch.randn(2, 4, 5, 16, device=device).to(dtype), torch.randn(2, 2, 9, 16, device=device).to(dtype)
    bias, lengths = torch.randn(1, 4, 1, 9, device=device), torch.tensor([9, 4], device=device)
    rng, table = torch.tensor([3, 4], device=device), torch.randn(8, 4, device=device)
    arguments = (q, k, k, bias, None, lengths, None, None, 5, 9, table, 20, True, rng, 0.25, 1, 3, 0, 2.0, 0.1)
    with tf.backend("cuda"):
        torch.library.opcheck(torch.ops.transformer_fast.attention.default, arguments)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_drawn_shapes_and_features(data):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    drawn = draw_features(data.draw, device, queries=(1, 150), keys=(1, 150), side=(0, 30))
    _padded(device, d=data.draw(st.sampled_from([3, 16, 40, 64, 100])), **drawn)


@pytest.mark.quick
def test_float32_is_refused_with_the_reason(device):
    q = torch.randn(1, 1, 4, 64, device=device)
    with tf.backend("cuda"), pytest.raises(RuntimeError, match="float32.*TF32"):
        tf.scaled_dot_product_attention(q, q, q)


def _native(device, **changes):
    """Call the native op with valid arguments, except for `changes`."""
    q = torch.randn(2, 2, 4, 16, device=device).half()
    arguments = {
        "query": q, "key": q, "value": q, "bias": None, "mask": None, "key_lengths": None, "cu_seqlens_q": None,
        "cu_seqlens_k": None, "max_seqlen_q": 4, "max_seqlen_k": 4, "relative_bias": None, "rng": None, "scale": 1.0,
        "bottom_right": 0, "window_left": -1, "window_right": -1, "softcap": 0.0, "dropout_p": 0.0,
        "out": torch.empty_like(q), "lse": torch.empty(2, 2, 4, device=device),
    }  # fmt: skip
    return torch.ops.transformer_fast.cuda_attention_forward(**arguments | changes)


BAD = {
    "dtype": ({"query": torch.zeros(2, 2, 4, 16, dtype=torch.float64)}, "dtype must be float32, bfloat16 or float16"),
    "float32": ({n: torch.zeros(2, 2, 4, 16) for n in ("query", "key", "value", "out")}, "no CUDA kernel.*float32"),
    "last_axis": ({"key": torch.zeros(2, 2, 16, 4).half().transpose(2, 3)}, "key: wanted a contiguous last axis"),
    "lengths": ({"key_lengths": torch.tensor([1, 2])}, "lengths: wanted int32, got int64"),
    "axes": ({"cu_seqlens_q": torch.tensor([0, 1]).int()}, "unpadded tensors have three axes"),
    "bias": ({"bias": torch.zeros(4, 4)}, r"bias: wanted shape \(any, any, any, any\), got shape \(4, 4\)"),
    "dropout": ({"dropout_p": 0.1}, "rng: wanted with dropout_p, got none"),
    "lse": ({"lse": torch.zeros(2, 2, 4).half()}, "lse: wanted float32, got float16"),
    "head_dim": (
        {n: torch.zeros(2, 2, 4, 264).half() for n in ("query", "key", "value", "out")},
        "wanted a head dim of 1 to 256",
    ),
    "heads": ({n: torch.zeros(2, 3, 4, 16).half() for n in ("key", "value")}, "wanted a divisor of 2 heads"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_arguments_of_the_native_op(case, device):
    changes, message = BAD[case]
    with pytest.raises(RuntimeError, match=message):
        _native(device, **{n: t.to(device) if isinstance(t, torch.Tensor) else t for n, t in changes.items()})


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", ["attention", "qkv", "unpadded"])
def test_a_remembered_call_has_the_same_results(device, name, gradients, monkeypatch):
    """The third call is launched at once."""
    monkeypatch.setattr(attention, "readable", lambda lengths: False)  # as on a GPU
    remembered.forget()
    check_repeats(device, name, "cuda", torch.bfloat16, gradients)
    assert remembered._calls or (name, gradients) == ("attention", False)  # ops/_attention_direct.py looks first
