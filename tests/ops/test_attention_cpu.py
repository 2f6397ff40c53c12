"""The CPU attention kernels against float64, on every instruction set of this processor."""

import contextlib

import pytest
import torch
from attention_cases import FLOATS, Case, check, draw_case
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import running_on
from numerics import GRADIENT, assert_as_accurate

import transformer_fast as tf
from transformer_fast.backends import native
from transformer_fast.ops.attention import qkv_attention

if native.load():
    pytest.skip(native.load(), allow_module_level=True)

ISAS = native.supported_isas()


@pytest.fixture(params=ISAS)
def isa(request):
    with running_on(request.param) as isa:
        yield isa


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_drawn(data):
    before = native.current_isa()
    native.set_isa(data.draw(st.sampled_from(ISAS)))
    try:
        check(draw_case(data.draw))
    finally:
        native.set_isa(before)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.quick
def test_plain_and_causal(isa, dtype):
    check(Case(2, 3, 3, 70, 150, 64, dtype))
    check(Case(1, 4, 2, 130, 130, 40, dtype, is_causal=True))


@pytest.mark.parametrize("dim", [1, 7, 33, 255, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_dims(isa, dim, dtype):
    check(Case(1, 2, 1, 40, 50, dim, dtype))


@pytest.mark.parametrize("queries", [1, 2, 6])
@pytest.mark.parametrize("dtype", FLOATS)
def test_decoding(isa, queries, dtype):
    check(Case(2, 6, 2, queries, 300, 64, dtype, is_causal=True, causal_alignment="bottom_right"))
    check(Case(2, 2, 2, queries, 261, 40, dtype, softcap=20.0, mask_axes=(1, 0, 0, 1), bias_axes=(0, 1, 1, 1)))
    check(Case(1, 2, 1, queries, 2100, 24, dtype, lengths=[2050], buckets=32))  # split over threads
    check(Case(3, 2, 2, queries, 40, 80, dtype, unpadded=True, lengths=[40, 0, 33], window=(30, None)))


def test_few_queries_with_dropout(isa):
    """Not a decoding step, as that has no dropout; torch's products of few rows are as accurate as dot products."""
    for keys in range(100, 180, 8):
        check(Case(3, 3, 3, 3, keys, 92, torch.float32, scale=1.0, dropout_p=0.1))


def test_bf16_bias_window_softcap_scale(isa):
    check(Case(2, 2, 2, 70, 140, 32, torch.bfloat16, bias_axes=(1, 1, 1, 1), window=(50, 20), softcap=5.0, scale=-0.2))


@pytest.mark.quick
def test_every_feature_at_once(isa):
    check(
        Case(
            2, 4, 2, 90, 170, 48, torch.float32, lengths=[170, 133], is_causal=True, causal_alignment="bottom_right",
            window=(100, None), softcap=15.0, dropout_p=0.2, mask_axes=(1, 0, 1, 1), bias_axes=(0, 1, 1, 1), buckets=32,
        )
    )  # fmt: skip


@pytest.mark.parametrize("logit", [60.0, 2000.0])
def test_one_huge_logit(isa, logit):
    torch.manual_seed(1)
    case = Case(1, 2, 2, 70, 90, 32, torch.float32)
    inputs = case.inputs()
    inputs.key[:, :, 5] = inputs.query[:, :, 9] * (logit * 32**0.5 / inputs.query[:, :, 9].square().sum(-1, True))
    check(case, inputs)


def test_minus_infinity_in_the_bias(isa):
    case = Case(1, 2, 2, 40, 140, 16, torch.float32, bias_axes=(1, 1, 1, 1))
    inputs = case.inputs()
    inputs.bias[inputs.bias > 0.5] = -float("inf")
    inputs.bias[:, :, 7] = -float("inf")  # a whole row
    check(case, inputs)


@pytest.mark.parametrize("queries", [3, 70])
def test_rows_with_nothing_to_attend_to(queries):
    q, k, v = (torch.randn(2, 2, n, 16, requires_grad=True) for n in (queries, 140, 140))
    mask = torch.rand(2, 1, queries, 140) > 0.5
    mask[0, 0, 1] = False
    mask[1] = False
    out, lse = tf.scaled_dot_product_attention(q, k, v, mask, return_lse=True)
    assert not out[1].any() and not out[0, :, 1].any()
    assert (lse[1] == -float("inf")).all() and (lse[0, :, 1] == -float("inf")).all()
    dq, dk, dv = torch.autograd.grad((out, lse), (q, k, v), (torch.randn_like(out), torch.randn_like(lse)))
    assert not dq[1].any() and not dq[0, :, 1].any() and not dk[1].any() and not dv[1].any()
    assert dq.isfinite().all() and dk.isfinite().all() and dv.isfinite().all() and dk[0].any()


def test_one_key_is_copied_and_scores_get_no_gradient(isa):
    q, k, v = (torch.randn(2, 3, n, 20, requires_grad=True) for n in (70, 1, 1))
    out = tf.scaled_dot_product_attention(q, k, v)
    assert torch.equal(out, v.expand_as(out))
    dq, dk = torch.autograd.grad(out, (q, k), torch.randn_like(out))
    assert not dq.any() and not dk.any()


def test_keys_past_their_length_get_zero_gradients():
    q, k, v = (torch.randn(3, 2, 30, 16, requires_grad=True) for _ in range(3))
    lengths = torch.tensor([30, 11, 0])
    out = tf.scaled_dot_product_attention(q, k, v, key_lengths=lengths)
    for grad in torch.autograd.grad(out, (k, v), torch.randn_like(out)):
        assert grad[0].all() and not grad[1, :, 11:].any() and not grad[2].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides(dtype):
    case = Case(2, 2, 2, 33, 40, 16, dtype)
    inputs = case.inputs()
    inputs.query = torch.randn(2, 33, 2, 32, dtype=dtype)[..., ::2].transpose(1, 2)
    inputs.key = torch.randn(1, 2, 40, 16, dtype=dtype).expand(2, -1, -1, -1)
    inputs.value = torch.randn(2, 2, 40, 51, dtype=dtype)[..., 3:19]
    inputs.grad_out = torch.randn(2, 2, 33, 1, dtype=dtype).expand(-1, -1, -1, 16)
    check(case, inputs)


def test_offsets_past_two_to_the_31():
    step = 3 << 29
    memory = torch.empty(3 * step + 64, dtype=torch.float16)  # untouched pages cost nothing
    q, k, v = (torch.randn(1, 2, 4, 16, dtype=torch.float16) for _ in range(3))
    far = memory.as_strided((1, 2, 4, 16), (0, 32, step, 1))
    far.copy_(k)
    near = tf.scaled_dot_product_attention(q, k, v)
    assert torch.equal(tf.scaled_dot_product_attention(q, far, v), near)
    far.copy_(v)
    assert torch.equal(tf.scaled_dot_product_attention(q, k, far), near)


@pytest.mark.parametrize("dim", [200, 201])
def test_dropout_drops_what_the_counter_says(isa, dim):
    from transformer_fast.backends.philox import keep_mask, keep_scale
    from transformer_fast.ops._common import draw_rng

    b, h, sq, sk, p = 2, 2, 70, 200, 0.3
    torch.manual_seed(11)
    rng = draw_rng(torch.device("cpu"))
    torch.manual_seed(11)
    zeros, v = torch.zeros(b, h, sq, dim), torch.eye(sk, dim).expand(b, h, sk, dim)
    out = tf.scaled_dot_product_attention(zeros, zeros[:, :, :1].expand(-1, -1, sk, -1), v, dropout_p=p)
    bh = torch.arange(b * h).view(b, h, 1, 1)
    kept = keep_mask(rng, p, bh, torch.arange(sq).view(-1, 1), torch.arange(sk))
    assert torch.equal(out[..., :sk] != 0, kept)
    assert out[..., :sk][kept].sub(keep_scale(p) / sk).abs().max() < 1e-7


@pytest.mark.parametrize("dtype", FLOATS)
def test_same_bits_twice_and_for_any_number_of_threads(isa, dtype):
    case = Case(3, 2, 1, 130, 200, 32, dtype, dropout_p=0.1, bias_axes=(0, 1, 1, 1), mask_axes=(1, 0, 0, 1), buckets=32)
    inputs = case.inputs()
    first = case.run(inputs, "cpu", dtype)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            for a, b in zip(first, case.run(inputs, "cpu", dtype)):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unpadded_gives_the_bits_of_padded(isa, dtype):
    lengths = [70, 1, 129]
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    q, k, v = (torch.randn(sum(lengths), 2, 32).to(dtype) for _ in range(3))
    torch.manual_seed(3)
    out = tf.varlen_attention(q, k, v, cu, is_causal=True, dropout_p=0.1)
    wide = [torch.zeros(3, 130, 2, 32, dtype=dtype) for _ in range(3)]
    for b, n in enumerate(lengths):
        for t, w in zip((q, k, v), wide):
            w[b, :n] = t[cu[b] : cu[b + 1]]
    torch.manual_seed(3)
    padded = tf.scaled_dot_product_attention(
        *(w.transpose(1, 2) for w in wide), is_causal=True, dropout_p=0.1, key_lengths=torch.tensor(lengths)
    )
    for b, n in enumerate(lengths):
        assert torch.equal(out[cu[b] : cu[b + 1]], padded[b, :, :n].transpose(0, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unpadded_causal_with_dropout(isa, dtype):
    check(Case(3, 2, 2, 130, 130, 32, dtype, unpadded=True, lengths=[70, 1, 129], is_causal=True, dropout_p=0.1))


@pytest.mark.quick
def test_gradient_of_fused_projections():
    qkv = torch.randn(50, 3, 2, 16, requires_grad=True)
    cu = torch.tensor([0, 20, 20, 50], dtype=torch.int32)
    grad = torch.randn(50, 2, 16)
    (unpadded,) = torch.autograd.grad(qkv_attention(qkv, cu, is_causal=True), qkv, grad)
    parts = [t.detach().requires_grad_() for t in qkv.unbind(1)]
    split = torch.autograd.grad(tf.varlen_attention(*parts, cu, is_causal=True), parts, grad)
    assert torch.equal(unpadded, torch.stack(split, 1))


def test_memory_is_linear(tmp_path):
    import subprocess
    import sys

    script = tmp_path / "long.py"
    script.write_text(
        "import resource, torch, transformer_fast as tf\n"
        "def step(n):\n"
        "    q, k, v = (torch.randn(1, 1, n, 16, requires_grad=True) for _ in range(3))\n"
        "    mask, table = torch.rand(1, 1, 1, n) > 0.1, torch.randn(32, 1, requires_grad=True)\n"
        "    y = tf.scaled_dot_product_attention(q, k, v, mask, 0.1, relative_bias=tf.RelativeBias(table))\n"
        "    y.sum().backward()\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = step(256)\n"
        "print((step(12000) - before) // 1024)\n"
    )
    grown = int(subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True).stdout)
    assert grown < 64, f"{grown} MiB more at 12000 positions, where scores alone would be 549 MiB"


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("softcap", [0.0, 20.0])
@pytest.mark.parametrize("offset", [1.0, 8.0])
def test_keys_and_values_with_an_offset_of_each_channel(isa, dtype, softcap, offset):
    """Biases of the key and value projections cause such offsets."""
    for keys in (300, 1100):  # whole rows of scores, and blocks of them
        case = Case(1, 2, 1, 70, keys, 64, dtype, softcap=softcap)
        inputs = case.inputs()
        inputs.key += offset * torch.randn(64).to(dtype)
        inputs.value += offset * torch.randn(64).to(dtype)
        check(case, inputs)


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 20, 1), (1, 3, 1, 1), (1, 1, 1, 1)])
def test_a_bias_of_whole_rows_moves_lse_alone(shape, with_lse):
    """Softmax does not depend on such a bias. Its gradient is that of lse, and exactly zero if lse has none."""
    q, k, v = (torch.randn(2, 3, n, 48, dtype=torch.bfloat16) for n in (20, 225, 225))
    mask = torch.rand(2, 1, 20, 225) > 0.2
    mask[0, 0, 3] = False  # nothing to attend to
    bias = torch.randn(shape)
    grads = torch.randn(2, 3, 20, 48), torch.randn(2, 3, 20)

    def gradient(cast, backend):
        leaf = cast(bias).requires_grad_()
        with backend:
            out, lse = tf.scaled_dot_product_attention(
                cast(q), cast(k), cast(v), mask, bias=leaf, softcap=20.0, return_lse=True
            )
        wanted = [(out, grads[0]), *([(lse, grads[1])] if with_lse else [])]
        return torch.autograd.grad([y for y, _ in wanted], leaf, [g.to(y.dtype) for y, g in wanted])[0]

    ours = gradient(lambda t: t.clone(), contextlib.nullcontext())
    truth, plain = (gradient(cast, tf.backend("eager")) for cast in (torch.Tensor.double, torch.Tensor.clone))
    if not with_lse:
        assert not ours.any()
        truth = torch.zeros_like(truth)  # exact, without float64's rounding
    assert_as_accurate(ours, truth, plain, GRADIENT, "bias")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dim", [64, 100])
def test_a_key_seen_alone_has_no_gradient(isa, dim, dtype):
    """Its probability is exactly 1 whatever the score, also in plain PyTorch."""
    q, k, v = (torch.randn(1, 2, n, dim).to(dtype) for n in (230, 300, 300))
    last = {"is_causal": True, "causal_alignment": "bottom_right", "window": (0, None)}
    for more in (last, {**last, "dropout_p": 0.3}, {"attn_mask": torch.eye(230, 300, dtype=torch.bool)}):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out = tf.scaled_dot_product_attention(*leaves, **more)
        dq, dk, dv = torch.autograd.grad(out, leaves, torch.randn(out.shape).to(dtype))
        assert not dq.any() and not dk.any() and dv.any(), more


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("keys", [300, 8200])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_a_key_left_alone_by_a_mask_has_no_gradient(dtype, keys, dropout_p):
    """For any number of keys, with and without dropout. It still gets a gradient from lse."""
    q, k, v = (torch.randn(1, 1, n, 16).to(dtype).requires_grad_() for n in (70, keys, keys))
    hidden = torch.zeros(70, keys, dtype=torch.bool)
    hidden[torch.arange(70), torch.arange(70) * 37 % keys] = True
    lowest = torch.where(hidden, 0.0, torch.finfo(dtype).min).to(dtype)
    for mask in (hidden, lowest):
        out, lse = tf.scaled_dot_product_attention(q, k, v, mask, dropout_p, return_lse=True)
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), torch.randn(out.shape).to(dtype), retain_graph=True)
        assert not dq.any() and not dk.any() and dv.any()
        (dq,) = torch.autograd.grad(lse, q, torch.ones_like(lse))
        expected = k.detach()[0, 0, torch.arange(70) * 37 % keys].double() / 4
        assert_as_accurate(dq[0, 0], expected, expected.to(dtype), GRADIENT)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("keys", [300, 1100])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_rows_that_a_bias_sharpens(dtype, keys, dropout_p):
    """The bias leaves almost all weight on one key. The score gradients are then almost zero, and must not contain the
    rounding of the output."""
    case = Case(1, 2, 2, 70, keys, 32, dtype, dropout_p=dropout_p, bias_axes=(0, 0, 1, 1))
    inputs = case.inputs()
    inputs.grad_lse.zero_()
    away = (torch.arange(keys) - torch.arange(70)[:, None] * 37 % keys).abs()
    inputs.bias = (-12.0 * away).to(dtype)[None, None]
    check(case, inputs)


@pytest.mark.parametrize("dtype", FLOATS)
def test_windows_across_two_groups_of_keys(isa, dtype):
    """Few keys fit one tile even if they cross a group of keys. Dropout counts keys from the start of each group."""
    last = {"is_causal": True, "causal_alignment": "bottom_right", "window": (3, None), "dropout_p": 0.3}
    check(Case(1, 2, 1, 150, 170, 100, dtype, **last))
    check(Case(1, 2, 1, 150, 300, 40, dtype, window=(20, 30), dropout_p=0.3, bias_axes=(0, 1, 1, 1), buckets=8))
