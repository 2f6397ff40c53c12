"""torch's own attention kernels as a backend of this package (backends/sdpa.py), and the selection of backends."""

import pathlib
import re

import attention_cases
import pytest
import torch
import torch.nn.functional as F
from attention_cases import Case
from hypothesis import given, settings
from hypothesis import strategies as st

import transformer_fast as tf
from transformer_fast import backends
from transformer_fast.backends import Call, measured

OP_SOURCES = list((pathlib.Path(backends.__file__).parent.parent / "ops").glob("*.py"))
# In float32 torch's CPU kernel has an approximate exp (20 units in the last place), so it is compared with torch
# itself.
HALF = [torch.bfloat16, torch.float16]
CASES = {
    "plain": {},
    "causal": {"is_causal": True},
    "causal_fewer_queries": {"is_causal": True, "queries": 33},
    "causal_more_queries": {"is_causal": True, "queries": 97, "lengths": [80, 31]},
    "bottom_right_of_a_square": {"is_causal": True, "causal_alignment": "bottom_right", "queries": 80},
    "grouped_heads": {"heads": 6, "key_heads": 2},
    "lengths": {"lengths": [57, 0]},
    "lengths_and_causal": {"lengths": [57, 0], "is_causal": True},
    "mask": {"mask_axes": (True, True, True, True)},
    "mask_of_keys": {"mask_axes": (True, False, False, True), "lengths": [80, 41]},
    "mask_of_queries": {"mask_axes": (True, False, True, False)},
    "mask_and_causal": {"mask_axes": (False, True, True, True), "is_causal": True},
    "scale": {"scale": 0.31},
    "negative_scale": {"scale": -0.2, "is_causal": True},
    "zero_scale": {"scale": 0.0},
}


def _case(name, dtype) -> Case:
    arguments = {"heads": 2, "key_heads": 2, "queries": 60} | CASES[name]
    return Case(batch=2, keys=80, dim=32, dtype=dtype, **arguments)


@pytest.mark.quick
@pytest.mark.parametrize("name", list(CASES))
def test_features(name):
    attention_cases.check(_case(name, HALF[len(name) % 2]), name="sdpa")


@pytest.mark.parametrize("causal", [False, True])
def test_float32_is_torch_bit_for_bit(causal):
    inputs = [torch.randn(2, 3, s, 32, requires_grad=True) for s in (50, 50, 50)]
    grad = torch.randn(2, 3, 50, 32)
    with tf.backend("sdpa"):
        ours = tf.scaled_dot_product_attention(*inputs, is_causal=causal)
        gradients = torch.autograd.grad(ours, inputs, grad)
    theirs = F.scaled_dot_product_attention(*inputs, is_causal=causal)
    assert torch.equal(ours, theirs)
    for a, b in zip(gradients, torch.autograd.grad(theirs, inputs, grad)):
        assert torch.equal(a, b)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.data())
def test_drawn_calls(data):
    case = attention_cases.draw_case(data.draw)
    case.dtype = HALF[case.keys % 2]
    case.unpadded, case.window, case.softcap, case.dropout_p, case.bias_axes, case.buckets = (
        False,
        None,
        0.0,
        0.0,
        None,
        0,
    )
    if case.queries != case.keys or case.lengths:
        case.causal_alignment = "top_left"
    attention_cases.check(case, name="sdpa")


def test_a_row_that_sees_nothing_is_zero_and_gets_no_gradient():
    q, k, v = (torch.randn(1, 2, 40, 16, requires_grad=True) for _ in range(3))
    mask = torch.rand(1, 1, 40, 40) > 0.3
    mask[:, :, :, :5] = False  # with the causal mask the first five rows have no keys
    with tf.backend("sdpa"):
        out, lse = tf.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=True, return_lse=True)
        grads = torch.autograd.grad((out, lse), (q, k, v), (torch.randn_like(out), torch.randn_like(lse)))
    assert out[:, :, :5].eq(0).all() and lse[:, :, :5].eq(-torch.inf).all() and out[:, :, 20:].ne(0).all()
    assert grads[0][:, :, :5].eq(0).all() and all(g.isfinite().all() for g in grads)


@pytest.mark.quick
@pytest.mark.parametrize(
    "more, reason",
    [
        ({"dropout_p": 0.1}, "dropout masks"),
        ({"softcap": 2.0}, "soft cap"),
        ({"window": (3, 3)}, "window"),
        ({"is_causal": True, "causal_alignment": "bottom_right"}, "top-left"),
        ({"bias": torch.zeros(1, 1, 6, 8)}, "bias"),
        ({"relative_bias": tf.RelativeBias(torch.zeros(8, 2))}, "relative"),
    ],
)
def test_what_it_lacks_is_said(more, reason):
    q, k, v = (torch.randn(1, 2, s, 16) for s in (6, 8, 8))
    with tf.backend("sdpa"), pytest.raises(backends.BackendError, match=reason):
        tf.scaled_dot_product_attention(q, k, v, **more)
    unpadded = torch.randn(8, 2, 16)
    with tf.backend("sdpa"), pytest.raises(backends.BackendError, match="unpadded"):
        tf.varlen_attention(unpadded, unpadded, unpadded, torch.tensor([0, 8]))
    assert any("not for norm" in r for r in backends.get("sdpa").why_not(Call("norm", "cpu", torch.float32, 8)))


@pytest.mark.quick
def test_it_stands_between_the_kernels_and_plain_torch_on_cuda():
    assert backends.ORDER["cuda"] == ("triton", "cuda", "sdpa", "eager")
    text = tf.explain(Call("attention", "cuda", torch.bfloat16, 64, ("causal",), 512))
    assert text.index("triton:") < text.index("cuda:") < text.index("sdpa:") < text.index("eager:")
    assert "length 512" in text
    assert "order: by design, not measured on a GPU" in text
    if not torch.cuda.is_available():
        assert "sdpa: could, comes later" in text  # no statement about a GPU that is not there
    odd = backends.get("sdpa").why_not(Call("attention", "cuda", torch.float16, 37))
    assert odd == ("head dim 37 is not a multiple of 8",)


@pytest.mark.quick
def test_a_detour_goes_last_of_the_kernels(monkeypatch):
    """If Triton would recompute the scores for each slice of a wide head, other backends go first."""
    triton, cuda, sdpa = (backends.get(name) for name in ("triton", "cuda", "sdpa"))
    for backend in (triton, cuda):
        monkeypatch.setattr(backend, "why_not", lambda call: ())
    wide = Call("attention", "cuda", torch.float32, 192, ("backward", "causal"), 256)
    narrow, forward = wide._replace(size=128), wide._replace(features=("causal",))
    chosen = {}
    for name, taken in (("cuda", ()), ("sdpa", (cuda,)), ("triton", (cuda, sdpa))):
        for backend in taken:
            monkeypatch.setattr(backend, "why_not", lambda call: ("no",))
        backends._select.cache_clear()
        chosen[name] = backends.select(wide).name
        assert backends.select(narrow).name == backends.select(forward).name == "triton"
    assert all(name == found for name, found in chosen.items())
    text = tf.explain(wide)
    assert text.index("cuda:") < text.index("sdpa:") < text.index("triton: chosen") < text.index("eager:")
    assert "slices" in text
    backends._select.cache_clear()


@pytest.mark.quick
def test_explain_says_what_is_forced():
    call = Call("norm", "cpu", torch.float32, 8)
    with tf.backend("eager"):
        assert tf.explain(tuple(call)).endswith("eager: forced")
    with tf.backend("sdpa"):
        assert "sdpa: forced, but cannot: torch's fused kernels are for attention" in tf.explain(call)


@pytest.mark.quick
def test_explain_knows_the_ops():
    called = set(re.findall(r'(?:Call\(|select\(\()"(\w+)"', "".join(p.read_text() for p in OP_SOURCES)))
    assert called == set(backends.OPS)
    for op in backends.OPS:
        assert tf.explain(Call(op, "cpu", torch.float32, 8)).startswith(f"{op} on cpu")
        with pytest.raises(TypeError, match=f"wanted a Call, got the name of an op; pass Call\\('{op}'"):
            tf.explain(op)
    for nonsense in ("nonsense", Call("nonsense", "cpu", torch.float32, 8), ("nonsense", "cuda", torch.float16, 64)):
        with pytest.raises(ValueError, match="no op 'nonsense'; there are additive_attention, attention, .*, norm, "):
            tf.explain(nonsense)


@pytest.mark.quick
def test_a_measured_line_goes_first(monkeypatch):
    line = measured.Line(
        "sdpa", "results/some-device", "attention", "cpu", dtypes=(torch.float32,), sizes=(16, 32), lengths=(0, 128),
        features=("causal", "key_lengths"),
    )  # fmt: skip
    monkeypatch.setattr(measured, "LINES", (line,))
    backends._select.cache_clear()
    try:
        call = Call("attention", "cpu", torch.float32, 16, ("causal",), 128)
        assert backends.select(call).name == "sdpa"
        assert "sdpa: chosen (measured fastest: results/some-device)" in tf.explain(call)
        for other in (
            {"op": "norm"}, {"device": "cuda"}, {"dtype": torch.float16}, {"size": 64}, {"length": 256},
            {"features": ("causal", "mask")},
        ):  # fmt: skip
            assert measured.line(call._replace(**other)) is None
        # A line never selects a backend that cannot run the call.
        monkeypatch.setattr(measured, "LINES", (line._replace(features=None),))
        backends._select.cache_clear()
        assert backends.select(call._replace(features=("softcap",))).name != "sdpa"
    finally:
        backends._select.cache_clear()


@pytest.mark.quick
def test_a_line_may_be_for_one_kind_of_gpu(monkeypatch):
    """As for 16-bit attention in CUDA C++ on sm_90, once a GPU has run it."""
    line = measured.Line(
        "cuda", "results/some-device", "attention", "cuda", dtypes=(torch.bfloat16, torch.float16), sizes=(64, 128),
        features=("bottom_right", "causal", "gqa", "key_lengths", "varlen"), capability=(9, 0),
    )  # fmt: skip
    monkeypatch.setattr(measured, "LINES", (line,))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    call = Call("attention", "cuda", torch.bfloat16, 128, ("backward", "causal"), 4096)
    for capability, first in (((9, 0), "cuda"), ((8, 0), "triton"), ((10, 0), "triton")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, found=capability: found)
        assert backends._order(call)[0] == first
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backends._order(call)[0] == "triton"


@pytest.mark.quick
def test_every_line_is_borne_out_by_the_results_it_names():
    """Of the benchmark's cases that a line holds for, all were faster than with the kernels that come first else."""
    from transformer_fast.benchmarks import results
    from transformer_fast.benchmarks.case import OURS

    for line in measured.LINES:
        assert (line.backend, line.op) == ("cuda", "attention"), "say here how its rows are found"
        rows = [row for row in results.read(results.ROOT / line.measured) if row["median_s"]]
        times = {(row["case"], row["candidate"]): float(row["median_s"]) for row in rows}
        compared = set()
        for (case, candidate), time in times.items():
            shape = next(row["shape"] for row in rows if row["case"] == case)
            if not case.startswith("attention-") or candidate != f"{OURS} cuda":
                continue
            length, size = map(int, shape.strip("()").split(", ")[2:])
            found = tuple(name for name in ("causal", "dropout", "padded") if name in case)
            features = tuple("key_lengths" if name == "padded" else name for name in found)
            if line._replace(capability=None).holds(Call("attention", "cuda", torch.bfloat16, size, features, length)):
                compared.add((case.split("/")[0], size, features))
                assert time < times[case, OURS], case
        assert {size for _, size, _ in compared} == set(line.sizes)
        assert {kind for kind, _, _ in compared} >= {"attention-forward", "attention-backward"}


@pytest.mark.quick
def test_the_shipped_lines_choose_on_their_gpu_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    call = Call("attention", "cuda", torch.bfloat16, 128, ("backward", "causal"), 4096)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert backends._order(call)[0] == "cuda" and backends._order(call._replace(features=()))[0] == "cuda"
    for other in ({"size": 96}, {"dtype": torch.float32}, {"length": 512}, {"features": ("causal", "mask")}):
        assert backends._order(call._replace(**other))[0] == "triton"
    assert "measured fastest: cuda-nvidia-h200/" in tf.explain(call)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert backends._order(call)[0] == "triton"


@pytest.mark.quick
def test_info_says_what_cuda_kernels_are_chosen_for(monkeypatch):
    from transformer_fast.backends import cuda

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "_missing", lambda: "")
    monkeypatch.setattr(cuda, "architectures", lambda: ("80", "90a"))
    for capability, text in (((9, 0), "chosen for calls of attention that"), ((8, 0), "chosen for no call")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, found=capability: found)
        assert text in cuda.BACKEND.status()


@pytest.mark.quick
def test_info_names_the_runs_that_tested_the_kernels(monkeypatch):
    from transformer_fast.backends import verified

    runs = (
        verified.Run("cuda-a/1", "GPU A", "abc", frozenset({"norm", "cuda norm"})),
        verified.Run("cuda-a/2", "GPU A", "def", frozenset({"norm", "attention"})),
    )
    monkeypatch.setattr(verified, "runs", lambda: runs)
    assert verified.summary() == (
        "GPU A, commit def: Triton: attention, norm (benchmarks/results/cuda-a/2). "
        "GPU A, commit abc: CUDA C++: norm (benchmarks/results/cuda-a/1)"
    )
    assert tf.info()["tested on a GPU"] == verified.summary() and verified.names() == {"norm", "attention", "cuda norm"}
    monkeypatch.setattr(verified, "runs", lambda: ())
    assert verified.summary() == "nothing" and not verified.names()
