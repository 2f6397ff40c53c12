"""The definitions in plain PyTorch, compared with torch, Hugging Face and published test vectors."""

import math

import pytest
import torch
import torch.nn.functional as F

import transformer_fast as tf
from transformer_fast.backends.eager import relative_buckets
from transformer_fast.backends.philox import keep_scale, philox, threshold

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def _eager():
    with tf.backend("eager"):
        yield


def _qkv(sq=5, sk=9, h=4, hk=4, d=16):
    return (torch.randn(2, n, s, d, dtype=torch.float64) for n, s in ((h, sq), (hk, sk), (hk, sk)))


@pytest.mark.parametrize("case", ["plain", "causal", "bool", "float", "gqa", "scale"])
def test_attention_is_torchs(case):
    q, k, v = _qkv(hk=2 if case == "gqa" else 4)
    kw = {
        "causal": {"is_causal": True},
        "bool": {"attn_mask": torch.rand(2, 1, 5, 9) > 0.4},
        "float": {"attn_mask": torch.randn(4, 5, 9, dtype=torch.float64)},
        "gqa": {"enable_gqa": True},
        "scale": {"scale": 0.7},
    }.get(case, {})
    torch.testing.assert_close(
        tf.scaled_dot_product_attention(q, k, v, **kw), F.scaled_dot_product_attention(q, k, v, **kw)
    )


def test_three_dimensions_are_a_batch_of_single_heads():
    q, k, v = (t[:, 0] for t in _qkv())
    mask = torch.rand(2, 5, 9) > 0.3
    torch.testing.assert_close(
        tf.scaled_dot_product_attention(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, mask)
    )


@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
@pytest.mark.parametrize("window", [None, (2, None), (None, 1), (0, 0), (3, 2)])
@pytest.mark.parametrize("causal", [False, True])
def test_positions(alignment, window, causal):
    q, k, v = _qkv()
    lengths = [9, 7]
    out, lse = tf.scaled_dot_product_attention(
        q, k, v, is_causal=causal, window=window, causal_alignment=alignment, key_lengths=torch.tensor(lengths),
        return_lse=True,
    )  # fmt: skip
    for b, n in enumerate(lengths):
        for i in range(5):
            position = i + (n - 5 if alignment == "bottom_right" else 0)
            left, right = window or (None, None)
            seen = [
                j for j in range(n)
                if (not causal or j <= position)
                and (left is None or j >= position - left)
                and (right is None or j <= position + right)
            ]  # fmt: skip
            if not seen:
                assert out[b, :, i].eq(0).all() and lse[b, :, i].eq(-math.inf).all()
                continue
            scores = torch.einsum("hd,hjd->hj", q[b, :, i], k[b, :, seen]) / 4
            torch.testing.assert_close(lse[b, :, i], scores.logsumexp(-1))
            torch.testing.assert_close(out[b, :, i], torch.einsum("hj,hjd->hd", scores.softmax(-1), v[b, :, seen]))


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("buckets,distance", [(32, 128), (8, 20), (64, 500)])
def test_relative_buckets_are_t5s(bidirectional, buckets, distance):
    from transformers.models.t5.modeling_t5 import T5Attention

    d = torch.arange(-600, 600)
    wanted = T5Attention._relative_position_bucket(d, bidirectional, buckets, distance)
    assert torch.equal(relative_buckets(d, buckets, distance, bidirectional), wanted)


def test_relative_bias_and_softcap():
    q, k, v = _qkv(sq=9)
    table = torch.randn(8, 4, dtype=torch.float64)
    j = torch.arange(9)
    bias = table[relative_buckets(j[None] - j[:, None], 8, 16, True)].permute(2, 0, 1)
    ours = tf.scaled_dot_product_attention(q, k, v, softcap=2.0, relative_bias=tf.RelativeBias(table, 16))
    scores = 2.0 * torch.tanh(q @ k.transpose(-1, -2) / 4 / 2.0) + bias
    torch.testing.assert_close(ours, scores.softmax(-1) @ v)


def test_varlen_is_each_sequence_alone():
    lengths_q, lengths_k = [3, 0, 5], [4, 2, 6]
    q, k, v = torch.randn(8, 4, 16), torch.randn(12, 2, 16), torch.randn(12, 2, 16)
    cu_q, cu_k = torch.tensor([0, 3, 3, 8]), torch.tensor([0, 4, 6, 12])
    bias = torch.randn(3, 1, 5, 6)
    out, lse = tf.varlen_attention(
        q, k, v, cu_q, cu_k, is_causal=True, causal_alignment="bottom_right", bias=bias, return_lse=True
    )
    assert lse.shape == (4, 8)
    for b in range(3):
        one = tf.scaled_dot_product_attention(
            *(
                t[cu[b] : cu[b + 1]].transpose(0, 1)[None]
                for t, cu in ((q, cu_q), (k, cu_k), (v, cu_k))
            ),
            enable_gqa=True, is_causal=True, causal_alignment="bottom_right",
            bias=bias[b : b + 1, :, : lengths_q[b], : lengths_k[b]],
        )  # fmt: skip
        torch.testing.assert_close(out[cu_q[b] : cu_q[b + 1]], one[0].transpose(0, 1))


def test_unpadded_and_padded_drop_the_same_elements():
    x = torch.randn(8, 2, 16)
    cu = torch.tensor([0, 3, 8])
    torch.manual_seed(4)
    unpadded = tf.varlen_attention(x, x, x, cu, dropout_p=0.4)
    padded = torch.zeros(2, 2, 5, 16)
    padded[0, :, :3], padded[1] = x[:3].transpose(0, 1), x[3:].transpose(0, 1)
    torch.manual_seed(4)
    out = tf.scaled_dot_product_attention(padded, padded, padded, dropout_p=0.4, key_lengths=torch.tensor([3, 5]))
    torch.testing.assert_close(unpadded, torch.cat([out[0, :, :3].transpose(0, 1), out[1].transpose(0, 1)]))


def test_probabilities_are_the_softmax():
    q, k, v = _qkv(hk=2)
    mask = torch.rand(2, 1, 5, 9) > 0.4
    out, lse = tf.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True, return_lse=True)
    p = tf.attention_probabilities(q, k, lse, attn_mask=mask)
    torch.testing.assert_close(p @ v.repeat_interleave(2, 1), out)
    torch.testing.assert_close(tf.attention_probabilities(q, k, lse, attn_mask=mask, heads=[3, 0]), p[:, [3, 0]])


@pytest.mark.parametrize("heads", [None, [2, 1]])
@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [None, [9, 7]])
def test_probabilities_know_every_feature(heads, alignment, causal, lengths):
    q, k, v = _qkv(hk=2)
    kw = {
        "is_causal": causal, "causal_alignment": alignment, "window": (3, 2), "softcap": 2.0, "scale": 0.7,
        "relative_bias": tf.RelativeBias(torch.randn(8, 4, dtype=torch.float64), 20),
        "attn_mask": torch.rand(5, 9) > 0.2, "bias": torch.randn(2, 4, 1, 9, dtype=torch.float64),
        "key_lengths": None if lengths is None else torch.tensor(lengths),
    }  # fmt: skip
    out, lse = tf.scaled_dot_product_attention(q, k, v, enable_gqa=True, return_lse=True, **kw)
    p = tf.attention_probabilities(q, k, lse, heads=heads, **kw)
    chosen = heads or range(4)
    torch.testing.assert_close(p @ v[:, [i // 2 for i in chosen]], out[:, list(chosen)])


def test_norms_are_torchs():
    x, w, b = torch.randn(3, 4, 6), torch.randn(4, 6), torch.randn(4, 6)
    torch.testing.assert_close(tf.layer_norm(x, (4, 6), w, b, 1e-3), F.layer_norm(x, (4, 6), w, b, 1e-3))
    torch.testing.assert_close(tf.rms_norm(x, 6, w[0]), F.rms_norm(x, (6,), w[0]))
    y, s = tf.add_layer_norm(x, 2 * x, w[0], b[0])
    torch.testing.assert_close(s, 3 * x)
    torch.testing.assert_close(y, F.layer_norm(3 * x, (6,), w[0], b[0]))
    y, s = tf.add_rms_norm(x, 2 * x, w[0])
    torch.testing.assert_close(y, F.rms_norm(3 * x, (6,), w[0], 1e-6))


def test_multi_head_attention_is_torchs():
    mha = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    x, memory = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    weights = (mha.in_proj_weight, mha.in_proj_bias, mha.out_proj.weight, mha.out_proj.bias)
    for key in (None, memory):
        wanted = mha(x, x if key is None else key, x if key is None else key)[0]
        torch.testing.assert_close(tf.multi_head_attention(x, key, None, 4, *weights), wanted)
    torch.testing.assert_close(tf.multi_head_attention(x, memory, memory.clone(), 4, *weights), wanted)


def test_philox_known_answers():
    """Philox4x32-7 vectors of the Random123 distribution (Salmon et al., 2011)."""
    for counter, key, words in (
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "5f6fb709 0d893f64 4f121f81 4f730a48"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "5207ddc2 45165e59 4d8ee751 8c52f662"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "4dfccaba 190a87f0 c47362ba b6b5242a"),
    ):
        inputs = [torch.tensor(int(w, 16)) for w in (counter + " " + key).split()]
        assert [f"{int(w):08x}" for w in philox(*inputs)] == words.split()


def test_dropout_scale_keeps_the_mean():
    for p in (0.1, 0.5, 1e-4, 0.9999):
        assert (1 - threshold(p) / 65536) * keep_scale(p) == pytest.approx(1.0, abs=1e-12)
