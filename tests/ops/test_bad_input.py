"""Bad input gets an error that names the argument, its value and what is expected."""

import math

import pytest
import torch

import transformer_fast as tf
from transformer_fast.ops import qkv_attention


def r(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype)


Q, K = r(2, 4, 5, 16), r(2, 4, 9, 16)
P = r(8, 4, 16)
CU = torch.tensor([0, 3, 8], dtype=torch.int32)
sdpa, varlen = tf.scaled_dot_product_attention, tf.varlen_attention

ATTENTION = {
    "rank": (lambda: sdpa(r(16), K, K), ValueError, "query.*4 dimensions"),
    "not a tensor": (lambda: sdpa([1.0], K, K), TypeError, "query.*list"),
    "integers": (lambda: sdpa(torch.ones(2, 4, 5, 16, dtype=torch.int64), K, K), TypeError, "query.*int64"),
    "dtypes": (lambda: sdpa(Q, K.half(), K), TypeError, "key.*float16.*query.*float32"),
    "devices": (lambda: sdpa(Q, K.to("meta"), K), ValueError, "key.*meta.*query.*cpu"),
    "batch": (lambda: sdpa(r(3, 4, 5, 16), K, K), ValueError, r"key.*batch \(3,\).*\(2,\)"),
    "head dims": (lambda: sdpa(Q, K[..., :8], K), ValueError, "key.*head dim 16.*8"),
    "value head dim": (lambda: varlen(P, P, P[..., :8], CU), ValueError, "value.*head dim 16.*8"),
    "head dim 0": (lambda: sdpa(Q[..., :0], K[..., :0], K[..., :0]), ValueError, r"1\.\.256.*0"),
    "head dim 257": (lambda: sdpa(*(r(1, 1, 2, 257) for _ in range(3))), ValueError, r"1\.\.256.*257"),
    "value positions": (lambda: sdpa(Q, K, K[:, :, :3]), ValueError, "value.*9 positions.*3"),
    "gqa without asking": (lambda: sdpa(Q, K[:, :2], K[:, :2]), ValueError, "enable_gqa"),
    "gqa not dividing": (lambda: sdpa(Q, K[:, :3], K[:, :3], enable_gqa=True), ValueError, "divides.*4.*3"),
    "value heads": (lambda: sdpa(Q, K, K[:, :2]), ValueError, "value.*4 heads.*2"),
    "mask shape": (lambda: sdpa(Q, K, K, torch.ones(3, 5, dtype=torch.bool)), ValueError, "attn_mask.*broadcast"),
    "mask dtype": (lambda: sdpa(Q, K, K, torch.ones(5, 9, dtype=torch.int64)), TypeError, "attn_mask.*int64"),
    "two biases": (lambda: sdpa(Q, K, K, r(5, 9), bias=r(5, 9)), ValueError, "bias.*both"),
    "bias shape": (lambda: sdpa(Q, K, K, bias=r(1, 7, 5, 9)), ValueError, "bias.*broadcast"),
    "bias dtype": (lambda: sdpa(Q, K, K, bias=torch.ones(5, 9, dtype=torch.bool)), TypeError, "bias.*bool"),
    "lengths range": (lambda: sdpa(Q, K, K, key_lengths=torch.tensor([3, 10])), ValueError, r"key_lengths.*\[0, 9\].*10"),  # noqa: E501
    "lengths negative": (lambda: sdpa(Q, K, K, key_lengths=torch.tensor([-1, 3])), ValueError, "key_lengths.*-1"),
    "lengths shape": (lambda: sdpa(Q, K, K, key_lengths=torch.tensor([3])), ValueError, r"key_lengths.*\(2,\)"),
    "lengths dtype": (lambda: sdpa(Q, K, K, key_lengths=torch.ones(2)), TypeError, "key_lengths.*float32"),
    "dropout 1.1": (lambda: sdpa(Q, K, K, dropout_p=1.1), ValueError, r"dropout_p.*\[0, 1\].*1\.1"),
    "dropout -1": (lambda: sdpa(Q, K, K, dropout_p=-0.1), ValueError, "dropout_p.*-0.1"),
    "dropout nan": (lambda: sdpa(Q, K, K, dropout_p=math.nan), ValueError, "dropout_p.*nan"),
    "scale nan": (lambda: sdpa(Q, K, K, scale=math.nan), ValueError, "scale.*nan"),
    "scale inf": (lambda: sdpa(Q, K, K, scale=math.inf), ValueError, "scale.*inf"),
    "softcap": (lambda: sdpa(Q, K, K, softcap=-1.0), ValueError, "softcap.*-1"),
    "alignment": (lambda: sdpa(Q, K, K, causal_alignment="left"), ValueError, "causal_alignment.*'left'"),
    "window": (lambda: sdpa(Q, K, K, window=(-2, 3)), ValueError, "window"),
    "window length": (lambda: sdpa(Q, K, K, window=(1,)), ValueError, "window"),
    "relative table": (
        lambda: sdpa(Q, K, K, relative_bias=tf.RelativeBias(r(32, 3))), ValueError, "relative_bias.table.*H = 4",
    ),
    "relative distance": (
        lambda: sdpa(Q, K, K, relative_bias=tf.RelativeBias(r(32, 4), 8)), ValueError, "max_distance.*more than 8",
    ),
    "unpadded rank": (lambda: varlen(Q, K, K, CU), ValueError, "query.*3 dimensions"),
    "cu end": (lambda: varlen(P, P, P, torch.tensor([0, 3, 9], dtype=torch.int32)), ValueError, "cu_seqlens_q.*8"),
    "cu start": (lambda: varlen(P, P, P, torch.tensor([1, 8], dtype=torch.int32)), ValueError, "start at 0"),
    "cu falling": (lambda: varlen(P, P, P, torch.tensor([0, 5, 3, 8])), ValueError, "never fall"),
    "cu dtype": (lambda: varlen(P, P, P, CU.float()), TypeError, "cu_seqlens_q.*float32"),
    "cu rank": (lambda: varlen(P, P, P, CU[None]), ValueError, r"cu_seqlens_q.*\(B \+ 1,\)"),
    "cu batch": (lambda: varlen(P, P, P, CU, torch.tensor([0, 8])), ValueError, "cu_seqlens_k.*3 entries.*2"),
    "max_seqlen": (lambda: varlen(P, P, P, CU, max_seqlen_q=4), ValueError, "max_seqlen.*5.*4"),
    "qkv": (lambda: qkv_attention(r(8, 2, 4, 16), CU), ValueError, "qkv.*3, H, D"),
    "lse": (lambda: tf.attention_probabilities(Q, K, r(2, 4, 9)), ValueError, "lse.*5"),
    "heads": (lambda: tf.attention_probabilities(Q, K, r(2, 4, 5), heads=[4]), ValueError, r"heads.*\[0, 3\].*4"),
}  # fmt: skip

X, W = r(6, 24), r(24)
LOGITS, TARGET = r(6, 24), torch.tensor([0, 23, -100, 5, 1, 2])
IDS, E = torch.tensor([[1, 2], [0, 8]]), r(9, 24)
ce, lce, embed = tf.cross_entropy, tf.linear_cross_entropy, tf.embedding_layer_norm
LOSSES = {
    "target above": (lambda: ce(LOGITS, TARGET + 1), ValueError, r"target.*\[0, 24\).*got 24"),
    "target below": (lambda: ce(LOGITS, TARGET.clamp(max=3) - 1), ValueError, "target.*-1"),
    "target shape": (lambda: ce(LOGITS, TARGET[:5]), ValueError, r"target.*\(6,\).*\(5,\)"),
    "probabilities": (lambda: ce(LOGITS, LOGITS.softmax(-1)), TypeError, "target.*probabilities"),
    "target dtype": (lambda: ce(LOGITS, TARGET.bool()), TypeError, "target.*bool"),
    "target list": (lambda: ce(LOGITS, [1]), TypeError, "target.*list"),
    "target device": (lambda: ce(LOGITS, TARGET.to("meta")), ValueError, "target.*meta"),
    "classes second": (lambda: ce(r(2, 24, 3), TARGET.view(2, 3)), ValueError, r"input.*\(2, 24, 3\).*flatten"),
    "no classes": (lambda: ce(r(6, 0), TARGET), ValueError, "input.*at least one class"),
    "logits dtype": (lambda: ce(TARGET[None], TARGET), TypeError, "input.*int64"),
    "class weight": (lambda: ce(LOGITS, TARGET, r(3)), ValueError, r"weight.*\(24,\).*\(3,\)"),
    "weight gradient": (lambda: ce(LOGITS, TARGET, r(24).requires_grad_()), ValueError, "weight.*no gradient"),
    "reduction": (lambda: ce(LOGITS, TARGET, reduction="max"), ValueError, "reduction.*'mean'.*'max'"),
    "smoothing": (lambda: ce(LOGITS, TARGET, label_smoothing=1.5), ValueError, r"label_smoothing.*\[0, 1\].*1.5"),
    "z_loss": (lambda: ce(LOGITS, TARGET, z_loss=-1.0), ValueError, "z_loss.*-1"),
    "z_loss nan": (lambda: ce(LOGITS, TARGET, z_loss=math.nan), ValueError, "z_loss.*nan"),
    "ignore_index": (lambda: ce(LOGITS, TARGET, ignore_index=1.5), TypeError, "ignore_index.*float"),
    "linear target": (lambda: lce(LOGITS, E, TARGET), ValueError, r"target.*\[0, 9\).*got 23"),
    "linear weight": (lambda: lce(LOGITS, r(9, 8), TARGET), ValueError, r"weight.*\(V, 24\).*\(9, 8\)"),
    "linear bias": (lambda: lce(LOGITS, E, TARGET, r(8)), ValueError, r"bias.*\(9,\).*\(8,\)"),
    "linear dtype": (lambda: lce(LOGITS, E.half(), TARGET), TypeError, "weight.*float16.*hidden.*float32"),
    "linear reduction": (lambda: lce(LOGITS, E, TARGET, reduction="none"), ValueError, "reduction.*'none'"),
    "chunk_rows": (lambda: lce(LOGITS, E, TARGET, chunk_rows=0), ValueError, "chunk_rows.*0"),
    "ids above": (lambda: embed(IDS + 1, E), ValueError, r"input_ids.*\[0, 9\).*got 9"),
    "ids below": (lambda: embed(IDS - 1, E), ValueError, "input_ids.*-1"),
    "positions": (lambda: embed(IDS, E, IDS, E[:5]), ValueError, r"position_ids.*\[0, 5\).*got 8"),
    "token types": (lambda: embed(IDS, E, None, None, IDS, E[:2]), ValueError, r"token_type_ids.*\[0, 2\)"),
    "ids dtype": (lambda: embed(E, E), TypeError, "input_ids.*float32"),
    "position shape": (lambda: embed(IDS, E, IDS[:, :1].expand(2, 3), E), ValueError, "position_ids.*broadcast"),
    "position alone": (lambda: embed(IDS, E, IDS), ValueError, "position_ids.*together with position_weight"),
    "position width": (lambda: embed(IDS, E, IDS, E[:, :5]), ValueError, r"position_weight.*\(entries, 24\)"),
    "position dtype": (lambda: embed(IDS, E, IDS, E.half()), TypeError, "position_weight.*float16"),
    "table rank": (lambda: embed(IDS, E[0]), ValueError, r"word_weight.*\(V, N\)"),
    "embedding norm": (lambda: embed(IDS, E, norm_weight=r(5)), ValueError, r"norm_weight.*\(24,\).*\(5,\)"),
    "embedding eps": (lambda: embed(IDS, E, eps=-1.0), ValueError, "eps.*-1"),
    "embedding dropout": (lambda: embed(IDS, E, dropout_p=1.5), ValueError, "dropout_p"),
    "padding": (lambda: embed(IDS, E, padding_idx=9), ValueError, r"padding_idx.*\[-9, 9\).*9"),
}  # fmt: skip
OTHERS = {
    "norm shape": (lambda: tf.layer_norm(X, 12), ValueError, r"normalized_shape.*\(12,\).*24"),
    "norm weight": (lambda: tf.layer_norm(X, 24, W[:5]), ValueError, r"weight.*\(24,\).*\(5,\)"),
    "norm bias": (lambda: tf.layer_norm(X, 24, W, W[:5]), ValueError, r"bias.*\(24,\).*\(5,\)"),
    "norm eps": (lambda: tf.layer_norm(X, 24, eps=-1.0), ValueError, "eps.*-1"),
    "norm eps nan": (lambda: tf.rms_norm(X, 24, eps=math.nan), ValueError, "eps.*nan"),
    "norm integers": (lambda: tf.rms_norm(torch.ones(3, 4, dtype=torch.int32), 4), TypeError, "input.*int32"),
    "norm device": (lambda: tf.layer_norm(X, 24, W.to("meta")), ValueError, "weight.*meta.*cpu"),
    "residual shape": (lambda: tf.add_layer_norm(X, X[:3]), ValueError, r"residual.*\(6, 24\).*\(3, 24\)"),
    "residual dropout": (lambda: tf.add_layer_norm(X, X, dropout_p=1.5), ValueError, "dropout_p.*1.5"),
    "scalar": (lambda: tf.add_rms_norm(torch.tensor(1.0), torch.tensor(1.0)), ValueError, "scalar"),
    "activation": (lambda: tf.bias_activation(X, None, "tanhshrink"), ValueError, "activation.*tanhshrink.*gelu"),
    "gate": (lambda: tf.bias_activation(X, gate=X[:, :3]), ValueError, "gate"),
    "dropout p": (lambda: tf.dropout(X, 2), ValueError, r"p: wanted a number in \[0, 1\]"),
    "heads": (
        lambda: tf.multi_head_attention(r(2, 5, 10), None, None, 3, r(30, 10), None, r(10, 10), None),
        ValueError, "num_heads.*10.*3",
    ),
    "in_proj": (
        lambda: tf.multi_head_attention(r(2, 5, 10), None, None, 2, r(20, 10), None, r(10, 10), None),
        ValueError, r"in_proj_weight.*\(30, 10\).*\(20, 10\)",
    ),
    "backend name": (lambda: tf.backend("cudnn").__enter__(), ValueError, "backend.*cudnn.*eager"),
}  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name):
    call, error, message = ATTENTION[name]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.quick
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_embeddings(name):
    call, error, message = LOSSES[name]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.quick
@pytest.mark.parametrize("name", OTHERS)
def test_others(name):
    call, error, message = OTHERS[name]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("shape", [(0, 4, 5, 16), (2, 4, 0, 16)])
def test_empty_queries_give_empty_results(shape):
    q = torch.randn(shape, requires_grad=True)
    k = torch.randn(shape[0], 4, 9, 16, requires_grad=True)
    out = sdpa(q, k, k)
    assert out.shape == shape
    out.sum().backward()
    assert k.grad.eq(0).all() and q.grad.shape == shape


def test_no_keys_give_zeros():
    q = torch.randn(2, 4, 5, 16, requires_grad=True)
    k = torch.randn(2, 4, 0, 16, requires_grad=True)
    out, lse = sdpa(q, k, k, return_lse=True)
    assert out.eq(0).all() and lse.eq(-math.inf).all()
    out.sum().backward()
    assert q.grad.eq(0).all()


@pytest.mark.parametrize("shape", [(0, 24), (3, 0), (2, 0, 24)])
def test_empty_rows(shape):
    x = torch.randn(shape, requires_grad=True)
    w = torch.randn(shape[-1], requires_grad=True)
    for y in (tf.layer_norm(x, shape[-1], w), tf.add_layer_norm(x, x)[0], tf.bias_activation(x, w), tf.dropout(x)):
        assert y.shape == shape
        y.sum().backward()
    assert w.grad.shape == w.shape and not w.grad.isnan().any()


def test_forced_backend_says_every_reason():
    with tf.backend("triton"), pytest.raises(RuntimeError, match="triton.*(not cuda|not installed)"):
        tf.layer_norm(torch.randn(3, 4, dtype=torch.float64), 4)
