"""The backward pass of CUDA C++ attention (mma.sync) against float64: on a GPU if there is one, else under the
emulator."""

import contextlib
import math

import cuda_emulator
import pytest
import torch
from attention_cases import bias_of, draw_features, next_to_one_key
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import GRADIENT, assert_as_accurate

import transformer_fast as tf
from transformer_fast.backends.philox import keep_mask
from transformer_fast.ops import qkv_attention

HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _on_the_device(device):
    # Compute capability 8.0, because on 9.0 the sm_90a kernels come first.
    with contextlib.nullcontext() if device == "cuda" else cuda_emulator.active(compute_capability=80):
        yield


def _call(backend, function, tensors, kw, grads, dtype=None):
    """The gradient of every tensor by name, with dropout drawn from one seed."""
    found = {}

    def leaf(name, t):
        found[name] = t.detach().to(dtype or t.dtype).requires_grad_()
        return found[name]

    kw = dict(kw)
    data = [leaf(name, t) for name, t in tensors.items()]
    if kw.get("bias") is not None:
        kw["bias"] = leaf("bias", kw["bias"])
    if "relative" in kw:
        table, *rest = kw.pop("relative")
        kw["relative_bias"] = tf.RelativeBias(leaf("relative", table), *rest)
    torch.manual_seed(11)
    with tf.backend(backend):
        outputs = function(*data, return_lse=True, **kw)
        wanted = [(o, g.to(o.dtype)) for o, g in zip(outputs, grads) if g is not None]
        gradients = torch.autograd.grad([o for o, _ in wanted], list(found.values()), [g for _, g in wanted])
    return dict(zip(found, gradients))


def _check(function, tensors, kw, grads):
    ours = _call("cuda", function, tensors, kw, grads)
    truth = _call("eager", function, tensors, kw, grads, torch.float64)
    eager = _call("eager", function, tensors, kw, grads)
    for name in truth:
        assert_as_accurate(ours[name], truth[name], eager[name], GRADIENT, f"gradient to {name}")
    return ours


def _padded(device, dtype, b=1, h=2, hk=None, sq=70, sk=100, d=64, offset=0.0, **kw):
    """Check a call on random (B, H, S, D) tensors with memory layout (B, S, H, D) against float64. offset: size of an
    offset of keys and values, different for each channel."""
    hk = hk or h
    kw = {n: v(b, h, sq, sk) if callable(v) else v for n, v in kw.items()}

    def heads(n, s, offset=0.0):
        moved = torch.randn(b, s, n, d, device=device) + offset * torch.randn(b, 1, n, d, device=device)
        return moved.to(dtype).transpose(1, 2)

    tensors = {"query": heads(h, sq), "key": heads(hk, sk, offset), "value": heads(hk, sk, offset)}
    if hk != h:
        kw["enable_gqa"] = True
    grads = torch.randn(b, h, sq, d, device=device), torch.randn(b, h, sq, device=device)
    return _check(tf.scaled_dot_product_attention, tensors, kw, grads)


# With up to 128 keys delta is summed from P and dP, with more it comes from the output.
CASES = {
    "plain": {},
    "many_keys": {"sq": 33, "sk": 200},
    "causal": {"sq": 150, "sk": 150, "is_causal": True},
    "bottom_right": {"is_causal": True, "causal_alignment": "bottom_right"},
    "window": {"sq": 130, "sk": 150, "window": (37, 30)},
    "window_left_of_bottom_right": {"sk": 140, "window": (15, None), "causal_alignment": "bottom_right"},
    "more_queries_than_keys": {"sq": 100, "sk": 30, "is_causal": True, "causal_alignment": "bottom_right"},
    "one_row_one_key": {"sq": 1, "sk": 1},
    "grouped_heads": {"h": 4, "hk": 2, "sk": 140, "is_causal": True},
    "softcap": {"softcap": 2.5},
    "negative_scale": {"scale": -0.3},
    "zero_scale": {"scale": 0.0},
    "narrow_head": {"d": 32, "sk": 130},
    "odd_head": {"d": 37},
    "head_of_80": {"d": 80, "sq": 40, "sk": 140},
    "head_of_128": {"d": 128, "sq": 40, "sk": 140, "is_causal": True},
    "head_of_128_softcap": {"d": 128, "sq": 40, "softcap": 3.0},
    "head_of_256": {"d": 256, "sq": 40, "sk": 72},
}


@pytest.mark.quick
@pytest.mark.parametrize("case", list(CASES))
def test_padded(case, device):
    _padded(device, HALF[len(case) % 2], **CASES[case])


@pytest.mark.parametrize("kw", [{"hk": 1}, {"softcap": 3.0}, {"d": 128}], ids=["grouped", "softcap", "head_of_128"])
@pytest.mark.parametrize("offset", [1.0, 8.0])
def test_keys_and_values_with_offsets(offset, kw, device):
    """The output's rounding causes an error in delta. In the query's gradient it is multiplied by the mean of the keys,
    which an offset per channel makes large."""
    _padded(device, HALF[offset == 1], **{"sk": 300, **kw}, offset=offset)


@pytest.mark.parametrize("axes", ["bhmn", "hmn", "bn", "m", "n", ""])
def test_bias_gradient_over_the_axes_it_broadcasts_along(axes, device):
    _padded(device, torch.bfloat16, b=2, sq=40, sk=50, bias=bias_of(axes, torch.bfloat16, device))


@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_relative_bias_gradient_to_its_table(d, bidirectional, device):
    table = torch.randn(8, 2, device=device)
    _padded(device, torch.float16, sk=90, d=d, relative=(table, 12, bidirectional), is_causal=not bidirectional)


def test_lengths_masks_and_minus_infinity(device):
    lengths = torch.tensor([77, 0], device=device)
    mask = torch.rand(2, 1, 24, 100, device=device) > 0.5
    mask[0, 0, 3] = False
    bias = torch.randn(2, 1, 24, 100, device=device).bfloat16()
    bias[:, :, 5:9] = -math.inf
    ours = _padded(device, torch.bfloat16, b=2, sq=24, key_lengths=lengths, attn_mask=mask, bias=bias)
    assert ours["key"][:, :, 77:].eq(0).all() and ours["value"][1].eq(0).all()
    assert ours["query"][0, :, [3, 6]].eq(0).all() and ours["query"][1].eq(0).all()


def test_what_lies_past_the_keys_is_never_read(device):
    q, k, v = (torch.randn(2, 2, s, 64, device=device).half() for s in (24, 80, 80))
    lengths = torch.tensor([17, 73], device=device)
    found = []
    for garbage in (0.0, math.nan):
        for b, n in enumerate(lengths.tolist()):
            k[b, :, n:], v[b, :, n:] = garbage, garbage
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        with tf.backend("cuda"):
            out = tf.scaled_dot_product_attention(*leaves, key_lengths=lengths)
            found.append(torch.autograd.grad(out.float().square().sum(), leaves))
    for clean, dirty in zip(*found):
        assert torch.equal(clean, dirty)


def test_one_huge_logit(device):
    q, k, v = (torch.randn(1, 1, 140, 64, device=device).half() for _ in range(3))
    q[0, 0, 5], k[0, 0, 133] = 20.0, 20.0
    grads = torch.randn(1, 1, 140, 64, device=device), None
    _check(tf.scaled_dot_product_attention, {"query": q, "key": k, "value": v}, {}, grads)


def test_dropout_mask_bit_for_bit(device):
    b, h, sq, sk, p = 1, 2, 40, 256, 0.3
    q, k = (torch.randn(b, h, s, sk, device=device).half() for s in (sq, sk))
    v = torch.eye(sk, device=device).half().expand(b, h, sk, sk).contiguous().requires_grad_()
    torch.manual_seed(5)
    with tf.backend("cuda"):
        out = tf.scaled_dot_product_attention(q, k, v, dropout_p=p, scale=0.01)
        rows = torch.eye(sq, sk, device=device).half().expand(b, h, sq, sk)
        (grad_v,) = torch.autograd.grad(out, v, rows)  # column i is P[i, :], or zero
    torch.manual_seed(5)
    rng = torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=device)
    i, j = torch.arange(sq, device=device)[:, None], torch.arange(sk, device=device)[None]
    kept = keep_mask(rng, p, torch.arange(b * h, device=device)[:, None, None], i[None], j[None]).view(b, h, sq, sk)
    assert torch.equal(grad_v[..., :sq].transpose(-1, -2) != 0, kept)


@pytest.mark.parametrize("d", [64, 128])
def test_dropout(d, device):
    _padded(device, torch.float16, h=1, sk=150, d=d, dropout_p=0.25, is_causal=d == 128)


def test_dropout_where_a_mask_leaves_next_to_one_key_of_many(device):
    _check(tf.scaled_dot_product_attention, *next_to_one_key(device))


def test_unpadded(device):
    """Sequences of different lengths, including an empty one and one without keys."""
    cu_q = torch.tensor([0, 20, 20, 93, 98], device=device)
    cu_k = torch.tensor([0, 33, 40, 40, 85], device=device)
    q, k, v = (torch.randn(n, h, 64, device=device).bfloat16() for n, h in ((98, 4), (85, 2), (85, 2)))
    grads = torch.randn(98, 4, 64, device=device), torch.randn(4, 98, device=device)
    kw = {
        "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "is_causal": True, "causal_alignment": "bottom_right",
        "dropout_p": 0.2, "bias": torch.randn(4, 1, 73, 45, device=device).bfloat16(),
        "relative": (torch.randn(8, 4, device=device), 20, True),
    }  # fmt: skip
    _check(tf.varlen_attention, {"query": q, "key": k, "value": v}, kw, grads)
    _check(tf.varlen_attention, {"query": q, "key": k, "value": v}, {n: kw[n] for n in list(kw)[:3]}, grads)


def test_gradient_of_a_fused_projection_is_written_in_place(device):
    qkv = torch.randn(90, 3, 2, 64, device=device).half()
    cu = torch.tensor([0, 17, 90], dtype=torch.int32, device=device)
    grads = torch.randn(90, 2, 64, device=device), None
    for causal in (False, True):
        _check(lambda x, **kw: qkv_attention(x, cu, **kw), {"qkv": qkv}, {"is_causal": causal}, grads)


def test_rows_of_any_alignment(device):
    """Rows that are not aligned are read element by element, with the same results bit for bit."""
    wide = torch.randn(3, 1, 70, 2, 67, device=device).bfloat16()
    odd = [t[..., 3:].transpose(1, 2) for t in wide]
    grads = []
    for tensors in (odd, [t.contiguous() for t in odd]):
        leaves = [t.detach().requires_grad_() for t in tensors]
        with tf.backend("cuda"):
            # With a soft cap, because aligned calls without features use other kernels with other tiles.
            out = tf.scaled_dot_product_attention(*leaves, is_causal=True, softcap=5.0)
            grads.append(torch.autograd.grad(out.float().square().sum(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_strides_past_32_bits(device):
    """Rows 2^30 elements apart: offsets within one tile need 64 bits."""
    if device == "cuda":
        pytest.skip("needs 6 GiB of GPU memory per tensor; the emulator checks the address arithmetic")
    step = 2**30
    far = []
    for _ in range(3):
        memory = torch.empty(2 * step + 16, dtype=torch.float16)  # untouched pages cost nothing
        far.append(memory.as_strided((1, 1, 3, 16), (0, 0, step, 1)))
        far[-1].copy_(torch.randn(1, 1, 3, 16))
    close = [t.clone(memory_format=torch.contiguous_format) for t in far]
    grads = []
    for tensors in (far, close):
        leaves = [t.detach().requires_grad_() for t in tensors]
        with tf.backend("cuda"):
            out = tf.scaled_dot_product_attention(*leaves)
            grads.append(torch.autograd.grad(out.float().square().sum(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data())
def test_drawn_shapes_and_features(data):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    drawn = draw_features(data.draw, device, queries=(10, 90), keys=(20, 150), side=(5, 60))
    _padded(device, d=data.draw(st.sampled_from([16, 40, 64])), **drawn)


def test_gradients_are_the_same_bits_whatever_the_order_of_warps(device):
    if device == "cuda":
        pytest.skip("only the emulator can change the order of warps")
    q, k, v = (torch.randn(1, 2, 140, 64).bfloat16().requires_grad_() for _ in range(3))
    bias = torch.randn(1, 1, 140, 140, requires_grad=True)
    table = torch.randn(8, 2, requires_grad=True)
    runs = []
    for late, seed in ((True, 0), (False, 3)):
        with cuda_emulator.active(late=late, seed=seed, compute_capability=80), tf.backend("cuda"):
            out = tf.scaled_dot_product_attention(q, k, v, bias=bias, relative_bias=tf.RelativeBias(table, 40, True))
            runs.append(torch.autograd.grad(out.float().square().sum(), (q, k, v, bias, table)))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_gradients_are_the_same_bits_every_time_on_a_gpu(device):
    if device == "cpu":
        pytest.skip("the previous test covers the emulator")
    q, k, v = (torch.randn(2, 8, 1024, 64, device=device, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    bias = torch.randn(1, 8, 1024, 1024, device=device, requires_grad=True)
    runs = []
    for _ in range(2):
        with tf.backend("cuda"):
            out = tf.scaled_dot_product_attention(q, k, v, bias=bias)
            runs.append(torch.autograd.grad(out.float().square().sum(), (q, k, v, bias)))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_shared_memory_is_read_without_bank_conflicts(device):
    if device == "cuda":
        pytest.skip("only the emulator counts bank conflicts")
    counters = cuda_emulator.library().counters
    for d in (64, 128, 256):
        cuda_emulator.library().reset_counters()
        _padded(device, torch.float16, h=1, sq=20, sk=40, d=d)
        assert counters()["ldmatrix"] > 0 and counters()["ldmatrix_conflicts"] == 0
