"""The sm_90a attention kernel (TMA, wgmma) against float64: on a GPU of compute capability 9.0 if there is one, else
under the emulator of CUDA kernels."""

import contextlib
import math

import cuda_emulator
import pytest
import torch
from numerics import assert_as_accurate

import transformer_fast as tf
from transformer_fast.ops import qkv_attention

HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _machine(device):
    if device == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("wgmma runs only on GPUs of compute capability 9.0")


@contextlib.contextmanager
def _kernel(device, late=True, seed=0, wgmma=True):
    """Run the block with the cuda backend, under the emulator if there is no GPU. wgmma: whether the wgmma kernel must
    run the call."""
    if device == "cuda":
        kernels: list[str] = []
        with tf.backend("cuda"), _launched(kernels):
            yield
        if any("attention" in name and "kernel" in name for name in kernels):  # else the profiler sees none here
            assert any("attention_forward_wgmma_kernel" in name for name in kernels) == wgmma, kernels
        return
    with cuda_emulator.active(late=late, seed=seed), tf.backend("cuda"):
        library = cuda_emulator.library()
        library.reset_counters()
        yield
        counters = library.counters()
    assert (counters["wgmma"] > 0) == wgmma, counters
    assert (counters["tma_loads"] > 0) == wgmma, counters


@contextlib.contextmanager
def _launched(kernels):
    """Collect the names of the kernels that the GPU runs."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        yield
        torch.cuda.synchronize()
    kernels += [event.name for event in profile.events()]


def _check(device, function, tensors, wgmma=True, late=True, seed=0, **kw):
    """Compare out and lse of a call with float64, and return them."""
    with _kernel(device, late, seed, wgmma):
        ours = function(*tensors, return_lse=True, **kw)
    with tf.backend("eager"):
        truth = function(*(t.double() for t in tensors), return_lse=True, **kw)
        eager = function(*tensors, return_lse=True, **kw)
    for name, *results in zip(("out", "lse"), ours, truth, eager):
        assert_as_accurate(*results, name=name)
    return ours


def _padded(device, b=1, h=2, hk=None, sq=200, sk=260, d=128, dtype=torch.bfloat16, **kw):
    """Check a call on random (B, H, S, D) tensors with memory layout (B, S, H, D)."""
    sizes = (h, sq), (hk or h, sk), (hk or h, sk)
    tensors = [torch.randn(b, s, n, d, device=device).to(dtype).transpose(1, 2) for n, s in sizes]
    kw = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in kw.items()}
    return _check(device, tf.scaled_dot_product_attention, tensors, enable_gqa=hk is not None, **kw)


BOTTOM_RIGHT = {"is_causal": True, "causal_alignment": "bottom_right"}
CASES = {
    "one_tile": {"sq": 128, "sk": 176},
    "several_tiles_with_ragged_ends": {"sq": 300, "sk": 400},
    "three_groups": {"sq": 250, "sk": 300, "d": 64},
    "fewer_keys_than_a_tile": {"sq": 17, "sk": 9, "b": 3, "h": 4},
    "one_key": {"sq": 17, "sk": 1, "h": 8, "b": 4, "d": 64},
    "causal": {"sq": 330, "sk": 330, "h": 1, "is_causal": True},
    "causal_64": {"sq": 400, "sk": 400, "d": 64, "is_causal": True},
    "causal_top_left": {"sq": 150, "sk": 300, "is_causal": True},
    "causal_bottom_right": {"sq": 150, "sk": 300, "h": 1, **BOTTOM_RIGHT},
    "rows_without_keys": {"sq": 300, "sk": 70, **BOTTOM_RIGHT},
    "window": {"sq": 300, "sk": 300, "h": 1, "window": (70, 30)},
    "window_within_a_tile": {"sq": 260, "sk": 500, "h": 1, "d": 64, "window": (9, 0),
                             "causal_alignment": "bottom_right"},
    "window_left": {"sq": 200, "sk": 400, "h": 1, "d": 64, "window": (150, None)},
    "grouped_heads": {"sq": 130, "sk": 140, "h": 6, "hk": 2, "is_causal": True},
    "scale": {"sq": 130, "sk": 200, "d": 64, "scale": 0.5},
    "lengths": {"b": 4, "h": 1, "sq": 140, "sk": 300, "key_lengths": torch.tensor([300, 177, 0, 5])},
    "lengths_and_causal": {"b": 3, "d": 64, "h": 1, "sq": 200, "sk": 300,
                           "key_lengths": torch.tensor([30, 290, 128]), **BOTTOM_RIGHT},
}  # fmt: skip


@pytest.mark.parametrize("case", list(CASES))
def test_padded(case, device):
    number = list(CASES).index(case)
    _padded(device, dtype=HALF[number % 2], seed=number, late=number % 3 > 0, **CASES[case])


@pytest.mark.quick
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("late, seed", [(False, 1), (True, 2), (True, 3)])
def test_any_order_of_warps(d, late, seed, device):
    _padded(device, h=3, sq=200, sk=300, d=d, late=late, seed=seed, is_causal=seed == 2)


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rise", [2.0, 7.0])
def test_scores_that_rise_or_fall_from_block_to_block(d, causal, rise, device):
    """By less and by more than what makes the kernel rescale its sums. Keys are read from the last to the first."""
    q, k, v = (torch.randn(1, 2, 700, d, device=device).to(torch.bfloat16) for _ in range(3))
    direction = torch.nn.functional.normalize(torch.randn(d, device=device), dim=0)
    along = q.float() @ direction
    q = (q.float() + (d**0.5 - along).unsqueeze(-1) * direction).to(torch.bfloat16)  # q . direction = sqrt(d)
    blocks = torch.arange(700, device=device) // 128 * rise
    signs = torch.tensor([1.0, -1.0], device=device).view(1, 2, 1, 1)  # of the heads
    k = (k.float() + signs * blocks.unsqueeze(-1) * direction).to(torch.bfloat16)
    _check(device, tf.scaled_dot_product_attention, (q, k, v), is_causal=causal)


def test_rows_without_keys_are_zeros(device):
    out, lse = _padded(device, sq=300, sk=70, **BOTTOM_RIGHT)
    assert out[:, :, :230].eq(0).all() and lse[:, :, :230].eq(-math.inf).all()


def _unpadded(device, queries, keys, h, hk, d, dtype, **kw):
    cu_q, cu_k = (torch.tensor([0, *n], device=device).cumsum(0).int() for n in (queries, keys))
    tensors = [
        torch.randn(sum(n), heads, d, device=device).to(dtype) for n, heads in ((queries, h), (keys, hk), (keys, hk))
    ]
    return _check(device, tf.varlen_attention, tensors, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **kw)


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("kw", [{}, {"is_causal": True}, BOTTOM_RIGHT], ids=["full", "causal", "bottom_right"])
def test_unpadded(d, kw, device):
    """Sequences of different lengths, including an empty one and one without keys."""
    _unpadded(device, [200, 0, 33, 140], [190, 10, 0, 260], 2, 1, d, HALF[d == 64], **kw)


def test_many_unpadded_sequences(device):
    """More sequences than the loader reads at once, with several tiles and with none."""
    lengths = [(5 * n) % 7 for n in range(70)]
    lengths[40] = 200
    _unpadded(device, lengths, lengths, 1, 1, 64, torch.float16, is_causal=True)


def test_fused_projection_is_read_in_place(device):
    qkv = torch.randn(300, 3, 2, 64, device=device).half()
    cu = torch.tensor([0, 17, 300], dtype=torch.int32, device=device)
    _check(device, lambda x, **kw: qkv_attention(x, cu, **kw), [qkv], is_causal=True)


def test_tiles_of_every_length_are_handed_out_once(device):
    """Many more tiles than multiprocessors, assigned by the counter, which each call finds in the state that the
    previous call left, and assigned round-robin."""
    for _ in range(2):
        _padded(device, b=2, h=7, sq=300, sk=300, d=64, is_causal=True)
    _unpadded(device, [5, 200, 9], [5, 200, 9], 3, 3, 64, torch.float16, is_causal=True)
    _padded(device, b=2, h=7, sq=200, sk=60, d=64)


@pytest.mark.parametrize("d, kw", [(64, {}), (128, {"is_causal": True})])
def test_what_lies_past_the_keys_is_never_used(d, kw, device):
    q, k, v = (torch.randn(2, 1, s, d, device=device).half() for s in (150, 300, 300))
    unpadded = [torch.randn(n, 1, d, device=device).half() for n in (150, 300, 300)]
    lengths = torch.tensor([170, 33], device=device)
    cu_q, cu_k = (torch.tensor(bounds, device=device) for bounds in ([0, 70, 150], [0, 130, 300]))
    outputs = []
    for garbage in (0.0, math.nan):
        for b, n in enumerate(lengths.tolist()):
            k[b, :, n:], v[b, :, n:] = garbage, garbage
        for t in unpadded[1:]:
            t[130:] = garbage
        with _kernel(device):
            padded = tf.scaled_dot_product_attention(q, k, v, key_lengths=lengths, **kw)
            first = tf.varlen_attention(*unpadded, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **kw)[:70]
        outputs.append((padded, first))
    for clean, dirty in zip(*outputs):
        assert torch.equal(clean, dirty) and not clean.isnan().any()


def test_one_huge_logit(device):
    q, k, v = (torch.randn(1, 2, 200, 64, device=device).half() for _ in range(3))
    q[0, 0, 5], k[0, 0, 133] = 30.0, 30.0
    _check(device, tf.scaled_dot_product_attention, [q, k, v])


def test_a_score_that_is_nan_shows_whatever_pipe_its_exponential_takes(device):
    q, k, v = (torch.randn(1, 1, s, 64, device=device).half() for s in (64, 200, 200))
    for column in (56, 59):  # at head dim 64 a polynomial computes the exponential of the second
        broken = k.clone()
        broken[:, :, column] = math.nan
        with _kernel(device):
            assert tf.scaled_dot_product_attention(q, broken, v).isnan().all()


REFUSED = {
    "bias": {"bias": torch.randn(1, 1, 20, 40)},
    "mask": {"attn_mask": torch.rand(1, 1, 20, 40) > 0.2},
    "softcap": {"softcap": 3.0},
    "negative_scale": {"scale": -0.2},
    "head_dim": {"d": 80},
}  # fmt: skip


@pytest.mark.parametrize("case", list(REFUSED))
def test_the_rest_goes_to_the_other_kernel(case, device):
    kw = dict(REFUSED[case])
    if "bias" in kw:
        kw["bias"] = kw["bias"].half()
    _padded(device, sq=20, sk=40, dtype=torch.float16, wgmma=False, **{"d": 64, **kw})


def test_rows_off_16_bytes_go_to_the_other_kernel(device):
    wide = torch.randn(1, 2, 60, 68, device=device).half()
    _check(device, tf.scaled_dot_product_attention, [wide[..., 4:]] * 3, wgmma=False)
