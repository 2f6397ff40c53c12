"""torch's requirements for ops: opcheck, one graph under torch.compile, autocast, correct gradients."""

import pytest
import torch
import torch.nn.functional as F

import transformer_fast as tf
from transformer_fast.ops import qkv_attention

CU = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
IDS = torch.tensor([[1, 8, 0, 1], [3, 3, 5, 2]])
TARGET = torch.tensor([3, -100, 0, 19, 7, 7])
COS = torch.linspace(-1, 1, 36).view(9, 4)
CLASS_WEIGHT = torch.linspace(0.5, 2, 20)


def _t(*shape, dtype=torch.float32, grad=True):
    return torch.randn(*shape).to(dtype).requires_grad_(grad)


def _calls():
    """name -> (function of the tensors, the tensors). Dropout uses torch's generator."""
    mask = torch.rand(2, 1, 5, 9) > 0.3
    relative = (8, 3)
    return {
        "layer_norm": (lambda x, w, b: tf.layer_norm(x, 24, w, b), (_t(4, 5, 24), _t(24), _t(24))),
        "rms_norm": (lambda x, w: tf.rms_norm(x, 24, w, 1e-6), (_t(4, 24), _t(24))),
        "add_layer_norm": (
            lambda x, r, w, b: tf.add_layer_norm(x, r, w, b, dropout_p=0.25),
            (_t(4, 24), _t(4, 24), _t(24), _t(24)),
        ),
        "add_rms_norm": (lambda x, r, w: tf.add_rms_norm(x, r, w, return_sum=False), (_t(4, 24), _t(4, 24), _t(24))),
        "bias_activation": (lambda x, b: tf.bias_activation(x, b, "gelu_tanh"), (_t(6, 20), _t(20))),
        "gated_activation": (
            lambda x, b: tf.bias_activation(x[..., :10], b, "silu", gate=x[..., 10:]),
            (_t(6, 20), _t(10)),
        ),
        "dropout": (lambda x: tf.dropout(x, 0.5), (_t(6, 20),)),
        "cross_entropy": (
            lambda x: tf.cross_entropy(x, TARGET, CLASS_WEIGHT.to(x.dtype), label_smoothing=0.1, z_loss=0.01),
            (_t(6, 20),),
        ),
        "rotary_embedding": (
            lambda x: tf.rotary_embedding(x, COS, COS.flip(0), torch.arange(3, 8)), (_t(2, 5, 3, 12),)
        ),
        "cross_entropy_in_place": (lambda x: tf.cross_entropy(x * 2, TARGET, inplace_gradient=True), (_t(6, 20),)),
        "linear_cross_entropy": (
            lambda x, w, b: tf.linear_cross_entropy(x, w, TARGET.view(2, 3), b, 2, z_loss=0.01),
            (_t(2, 3, 8), _t(20, 8), _t(20)),
        ),
        "embedding_layer_norm": (
            lambda e, p, s, w, b: tf.embedding_layer_norm(
                IDS, e, torch.arange(4), p, IDS % 2, s, w, b, dropout_p=0.25, padding_idx=6
            ),
            (_t(9, 24), _t(6, 24), _t(2, 24), _t(24), _t(24)),
        ),
        "linear": (lambda x, w, b: tf.linear(x, w, b, "gelu"), (_t(6, 20), _t(12, 20), _t(12))),
        "projections": (
            lambda x, *w: tf.projections(x, w[:3], w[3:]),
            (_t(6, 20), *(_t(4, 20) for _ in range(3)), *(_t(4) for _ in range(3))),
        ),
        "attention": (
            lambda q, k, v: tf.scaled_dot_product_attention(q, k, v, is_causal=True, return_lse=True),
            (_t(2, 3, 5, 16), _t(2, 3, 9, 16), _t(2, 3, 9, 16)),
        ),
        "attention_everything": (
            lambda q, k, v, bias, table: tf.scaled_dot_product_attention(
                q, k, v, mask, 0.2, True, 0.3, True, bias=bias, key_lengths=torch.tensor([9, 4]),
                causal_alignment="bottom_right", window=(6, None), softcap=5.0,
                relative_bias=tf.RelativeBias(table, 16, False),
            ),
            (_t(2, 3, 5, 16), _t(2, 1, 9, 16), _t(2, 1, 9, 16), _t(1, 3, 5, 9), _t(*relative)),
        ),
        "varlen_attention": (
            lambda q, k, v: tf.varlen_attention(q, k, v, CU, max_seqlen_q=5),
            (_t(8, 3, 16), _t(8, 3, 16), _t(8, 3, 16)),
        ),
        "qkv_attention": (lambda x: qkv_attention(x, CU, 5, 0.1), (_t(8, 3, 2, 16),)),
        "qkv_attention_padded": (lambda x: qkv_attention(x, is_causal=True), (_t(2, 7, 3, 2, 16),)),
        "multi_head_attention": (
            lambda x, w, b, o, c: tf.multi_head_attention(x, None, None, 4, w, b, o, c),
            (_t(2, 6, 16), _t(48, 16), _t(48), _t(16, 16), _t(16)),
        ),
        "attention_probabilities": (
            lambda q, k: tf.attention_probabilities(
                q, k, tf.scaled_dot_product_attention(q, k, k, return_lse=True)[1], heads=[1]
            ),
            (_t(2, 3, 5, 16), _t(2, 3, 9, 16)),
        ),
    }  # fmt: skip


CALLS = sorted(_calls())


def _outputs(result):
    return [r for r in (result if isinstance(result, tuple) else (result,)) if r.requires_grad]


def _loss(result):
    return sum((o.float() * torch.linspace(-1, 1, o.numel()).view(o.shape)).sum() for o in _outputs(result))


@pytest.mark.quick
@pytest.mark.parametrize("name", CALLS)
def test_compiles_to_one_graph_with_equal_results(name):
    function, tensors = _calls()[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for f in (function, compiled):
        torch.manual_seed(7)
        result = f(*tensors)
        results.append((_outputs(result), torch.autograd.grad(_loss(result), tensors, allow_unused=True)))
    for ours, theirs in zip(results[0], results[1]):
        for a, b in zip(ours, theirs):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b)


SCALARS = {
    "scale": (lambda x, s: tf.scaled_dot_product_attention(x, x, x, scale=s), (0.25, 0.5, 0.75)),
    "softcap": (lambda x, s: tf.scaled_dot_product_attention(x, x, x, softcap=s), (5.0, 7.0, 9.0)),
    "attention dropout": (lambda x, s: tf.scaled_dot_product_attention(x, x, x, dropout_p=s), (0.5, 0.3, 0.2)),
    "eps": (lambda x, s: tf.layer_norm(x, 16, eps=s), (1e-5, 1e-6, 1e-3)),
    "rms eps": (lambda x, s: tf.add_rms_norm(x, x, eps=s, dropout_p=0.1)[0], (1e-5, 1e-6, 1e-3)),
    "norm dropout": (lambda x, s: tf.add_layer_norm(x, x, dropout_p=s)[0], (0.5, 0.3, 0.2)),
    "dropout": (lambda x, s: tf.dropout(x, s), (0.5, 0.3, 0.2)),
    "label smoothing": (
        lambda x, s: tf.cross_entropy(
            x.flatten(0, -2), torch.ones(x[..., 0].numel()).long(), label_smoothing=s, z_loss=s
        ),
        (0.1, 0.2, 0.3),
    ),
    "varlen scale": (lambda x, s: tf.varlen_attention(*[x[0, 0][:, None]] * 3, torch.tensor([0, 2, x.shape[2]]), None,
                                                     x.shape[2], scale=s, dropout_p=s), (0.25, 0.5, 0.75)),
    "qkv scale": (lambda x, s: qkv_attention(x[:, :, None].expand(-1, -1, 3, -1, -1), scale=s), (0.25, 0.5, 0.75)),
}  # fmt: skip


@pytest.mark.parametrize("dynamic", [True, None])
@pytest.mark.parametrize("name", SCALARS)
def test_compiles_where_numbers_and_shapes_change(name, dynamic):
    function, values = SCALARS[name]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for i, value in enumerate(values):
        x, results = _t(2, 3, 5 + i, 16), []
        for f in (function, compiled):
            torch.manual_seed(7)
            result = f(x, value)
            results.append((result, *torch.autograd.grad(result.square().sum(), x)))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", CALLS)
def test_compiles_with_dynamic_shapes(name):
    function, tensors = _calls()[name]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    results = []
    for f in (function, compiled):
        torch.manual_seed(7)
        result = f(*tensors)
        results.append(torch.autograd.grad(_loss(result), tensors, allow_unused=True))
    torch.testing.assert_close(*results)


def test_compiles_with_inductor():
    x, r, w = _t(6, 24), _t(6, 24), _t(24)

    def block(x, r, w):
        y = tf.add_layer_norm(x, r, w, return_sum=False)
        q = y.view(1, 6, 2, 12).transpose(1, 2)
        return tf.bias_activation(tf.scaled_dot_product_attention(q, q, q), None, "silu")

    torch.testing.assert_close(torch.compile(block, fullgraph=True)(x, r, w), block(x, r, w))


OPCHECKS = ["norm", "norm_rms", "bias_activation", "dropout", "attention", "unpadded", "qkv", "cross_entropy"]
OPCHECKS += ["linear_cross_entropy", "embedding_layer_norm"]


@pytest.mark.parametrize("name", OPCHECKS)
def test_opcheck(name):
    rng = torch.tensor([3, 4])
    q, k = _t(2, 3, 5, 16), _t(2, 3, 9, 16)
    cases = {
        "norm": ("norm", (_t(4, 24), _t(4, 24), _t(24), _t(24), rng, 1e-5, False, 0.25, True, True)),
        "norm_rms": ("norm", (_t(4, 24), None, _t(24), None, None, 1e-5, True, 0.0, False, True)),
        "bias_activation": ("bias_activation", (_t(4, 24), _t(24), _t(4, 24), "gelu")),
        "dropout": ("dropout", (_t(4, 24), rng, 0.25)),
        "attention": (
            "attention",
            (q, k, k.detach().clone().requires_grad_(), _t(1, 3, 5, 9), None, None, None, None, 5, 9, _t(8, 3), 16,
             True, rng, 0.25, 0, -1, 0, 0.0, 0.1),
        ),
        "unpadded": (
            "attention",
            (_t(8, 3, 16), _t(8, 3, 16), _t(8, 3, 16), None, None, None, CU, CU, 5, 5, None, 0, False, None, 0.25, 0,
             -1, -1, 0.0, 0.0),
        ),
        "qkv": ("qkv_attention", (_t(8, 3, 2, 16), None, CU, 5, None, 0.25, 1, 0.0)),
        "cross_entropy": ("cross_entropy", (_t(6, 20), TARGET, CLASS_WEIGHT, -100, 0.1, 0.01, False)),
        "linear_cross_entropy": (
            "linear_cross_entropy",
            (_t(6, 8), _t(20, 8), _t(20), TARGET, -100, True, 0.1, 0.01, 4, True, True, True),
        ),
        "embedding_layer_norm": (
            "embedding_layer_norm",
            (IDS, _t(9, 24), IDS % 4, _t(6, 24), IDS % 2, _t(2, 24), _t(24), _t(24), rng, 1e-12, 0.25, 1),
        ),
    }  # fmt: skip
    op, arguments = cases[name]
    torch.library.opcheck(getattr(torch.ops.transformer_fast, op).default, arguments)


@pytest.mark.parametrize("name", [n for n in CALLS if n not in ("attention_probabilities", "cross_entropy_in_place")])
def test_plain_pytorch_gradients_by_finite_differences(name, monkeypatch):
    function, tensors = _calls()[name]
    tensors = tuple(t.detach().double().requires_grad_() for t in tensors)

    def seeded(*tensors):
        torch.manual_seed(11)
        return tuple(_outputs(function(*tensors)))

    with tf.backend("eager"):
        torch.autograd.gradcheck(seeded, tensors, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_follows_torch(dtype):
    q, k, v = _t(2, 3, 5, 16), _t(2, 3, 9, 16), _t(2, 3, 9, 16)
    x, w, b = _t(4, 24), _t(24), _t(24)
    weight = _t(12, 24)
    with torch.autocast("cpu", dtype=dtype):
        pairs = [
            (tf.scaled_dot_product_attention(q, k, v), F.scaled_dot_product_attention(q, k, v)),
            (tf.linear(x, weight), F.linear(x, weight)),
            (tf.layer_norm(x, 24, w, b), F.layer_norm(x, (24,), w, b)),
            (tf.layer_norm(x.to(dtype), 24, w, b), F.layer_norm(x.to(dtype), (24,), w, b)),
        ]
    for ours, theirs in pairs:
        assert ours.dtype == theirs.dtype
        _loss(ours).backward()
    assert q.grad is not None and q.grad.dtype == torch.float32


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context):
    for name, (function, tensors) in _calls().items():
        torch.manual_seed(3)
        with_grad = function(*tensors)
        torch.manual_seed(3)
        with context():
            without = function(*tensors)
        firsts = [r[0] if isinstance(r, tuple) else r for r in (with_grad, without)]
        assert not firsts[1].requires_grad, name
        torch.testing.assert_close(firsts[0].detach(), firsts[1], msg=name)


def test_dropout_follows_torch_generators():
    x = torch.ones(64, 200)
    torch.manual_seed(5)
    first = tf.dropout(x, 0.3)
    assert not torch.equal(first, tf.dropout(x, 0.3))
    torch.manual_seed(5)
    assert torch.equal(first, tf.dropout(x, 0.3))
    with torch.random.fork_rng():
        tf.dropout(x, 0.3)
    torch.manual_seed(5)
    with torch.random.fork_rng():
        tf.dropout(x, 0.3)
    assert torch.equal(first, tf.dropout(x, 0.3))
    g = torch.Generator().manual_seed(9)
    a = tf.dropout(x, 0.3, generator=g)
    assert torch.equal(a, tf.dropout(x, 0.3, generator=torch.Generator().manual_seed(9)))


def test_dropout_under_checkpoint_redraws_the_same_mask():
    x = _t(16, 32)
    q = _t(1, 2, 8, 16)

    def block(x, q):
        a = tf.scaled_dot_product_attention(q, q, q, dropout_p=0.4)
        return tf.add_layer_norm(x, x, dropout_p=0.4, return_sum=False).sum(-1).square().sum() + a.square().sum()

    torch.manual_seed(1)
    plain = torch.autograd.grad(block(x, q), (x, q))
    torch.manual_seed(1)
    kept = torch.autograd.grad(torch.utils.checkpoint.checkpoint(block, x, q, use_reentrant=False), (x, q))
    for a, b in zip(plain, kept):
        torch.testing.assert_close(a, b)


def test_dropout_is_unbiased_and_uncorrelated():
    p = 0.3
    kept = (tf.dropout(torch.ones(2000, 256), p) != 0).double()
    n = kept.numel()
    assert abs(kept.mean() - (1 - p)) < 5 * (p * (1 - p) / n) ** 0.5
    centred = kept - kept.mean()
    for other in (centred.roll(1, 0), centred.roll(1, 1), centred.roll(16, 1), centred.roll(128, 1)):
        assert abs((centred * other).mean() / (p * (1 - p))) < 5 / n**0.5
