"""Every tensor argument of every op of the GPU backends, forward and backward, with any strides and offsets."""

import contextlib

import cuda_emulator
import pytest
import torch
import triton_interpreter
from numerics import GRADIENT, OUTPUT, assert_as_accurate

import transformer_fast as tf

WIDTH, HALF = 24, torch.float16


def _vector(n=WIDTH):
    return torch.rand(n) + 0.5


def _integers(*values):
    return torch.tensor(values)


def _heads(heads, length, dtype=HALF):
    return torch.randn(2, heads, length, 16).to(dtype)


# op -> its call and its tensors; floating-point ones want a gradient where `gradients` says so.
CALLS = {
    "layer_norm": (lambda x, w, b: tf.layer_norm(x, (WIDTH,), w, b), lambda: {
        "x": torch.randn(5, 2, WIDTH), "w": _vector(), "b": _vector()}),
    "rms_norm": (lambda x, w: tf.rms_norm(x, (WIDTH,), w), lambda: {"x": torch.randn(7, WIDTH).half(), "w": _vector()}),
    "add_layer_norm": (lambda x, r, w, b: tf.add_layer_norm(x, r, w, b, dropout_p=0.2), lambda: {
        "x": torch.randn(9, WIDTH), "r": torch.randn(9, WIDTH), "w": _vector(), "b": _vector()}),
    "bias_activation": (lambda x, b, g: tf.bias_activation(x, b, "gelu", gate=g), lambda: {
        "x": torch.randn(9, WIDTH), "b": _vector(), "g": torch.randn(9, WIDTH)}),
    "dropout": (lambda x: tf.dropout(x, 0.3), lambda: {"x": torch.randn(9, WIDTH)}),
    "cross_entropy": (
        lambda x, t, w: tf.cross_entropy(x, t, w, label_smoothing=0.1, reduction="none"), lambda: {
            "x": torch.randn(9, WIDTH), "t": torch.arange(9), "w": _vector()}),
    "embedding_layer_norm": (
        lambda i, word, p, position, k, kind, w, b: tf.embedding_layer_norm(
            i, word, p, position, k, kind, w, b, dropout_p=0.2), lambda: {
            "i": torch.arange(12).view(3, 4), "word": torch.randn(12, WIDTH), "p": torch.arange(12).view(3, 4) % 5,
            "position": torch.randn(5, WIDTH), "k": torch.arange(12).view(3, 4) % 2, "kind": torch.randn(2, WIDTH),
            "w": _vector(), "b": _vector()}),
    "additive_attention": (
        lambda q, k, v, w, b, m, n: tf.additive_attention(q, k, v, w, b, attn_mask=m, key_lengths=n), lambda: {
            "q": torch.randn(2, 3, WIDTH), "k": torch.randn(2, 5, WIDTH), "v": torch.randn(2, 5, 8), "w": _vector(),
            "b": _vector(), "m": torch.rand(2, 3, 5) > 0.3, "n": _integers(5, 2)}),
    "attention": (
        lambda q, k, v, m, b, n: tf.scaled_dot_product_attention(q, k, v, attn_mask=m, bias=b, key_lengths=n,
                                                                 enable_gqa=True), lambda: {
            "q": _heads(4, 20), "k": _heads(2, 18), "v": _heads(2, 18), "m": torch.rand(2, 1, 20, 18) > 0.3,
            "b": torch.randn(2, 4, 20, 18).half(), "n": _integers(18, 7)}),
    "attention_relative": (
        lambda q, k, v, t: tf.scaled_dot_product_attention(q, k, v, is_causal=True,
                                                           relative_bias=tf.RelativeBias(t, 12, False)), lambda: {
            "q": _heads(2, 20), "k": _heads(2, 20), "v": _heads(2, 20), "t": torch.randn(8, 2)}),
    "varlen_attention": (
        lambda q, k, v, a, b: tf.varlen_attention(q, k, v, a, b, max_seqlen_q=20, max_seqlen_k=21), lambda: {
            **{n: torch.randn(40, 2, 16).half() for n in "qkv"}, "a": _integers(0, 20, 40).int(),
            "b": _integers(0, 19, 40).int()}),
    "qkv_attention": (
        lambda x, a: tf.ops.qkv_attention(x, a, max_seqlen=22), lambda: {
            "x": torch.randn(40, 3, 2, 16).half(), "a": _integers(0, 22, 40).int()}),
    "rotary_embedding": (
        lambda x, c, s, p: tf.ops.rotary_embedding(x, c, s, p), lambda: {
            "x": torch.randn(2, 6, 3, 16), "c": torch.randn(9, 6), "s": torch.randn(9, 6),
            "p": torch.arange(12).view(2, 6) % 9}),
    "kv_cache_attention": (None, lambda: {
        "q": _heads(2, 1), "k": _heads(2, 1), "v": _heads(2, 1), "kc": _heads(2, 30), "vc": _heads(2, 30),
        "n": _integers(12, 29)}),
}  # fmt: skip
SINGLE = (
    "layer_norm",
    "rms_norm",
    "add_layer_norm",
    "rotary_embedding",
)  # the rest of the cuda backend is 16-bit attention
OF_CUDA = (*SINGLE, "attention", "attention_relative", "varlen_attention", "qkv_attention", "kv_cache_attention")


CONSTANT = (("cross_entropy", "w"), ("rotary_embedding", "c"), ("rotary_embedding", "s"))  # get no gradient


def _poisoned(shape, dtype):
    return torch.full(shape, float("nan") if dtype.is_floating_point else 1, dtype=dtype)


def _every_other(t):
    room = _poisoned((*t.shape, 2), t.dtype)
    room[..., 1] = t
    return room[..., 1]


def _behind_others(t):
    room = _poisoned((t.numel() + 3,), t.dtype)
    room[3:] = t.flatten()
    return room[3:].view(t.shape)


def _transposed(t):
    return t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() > 1 else _every_other(t)


def _expanded(t):
    """Vectors: the same value everywhere. (A row of equal values has no variance: its norm is noise.)"""
    return t[:1].expand(t.shape) if t.is_floating_point() and t.dim() == 1 else _every_other(t)


WAYS = {f.__name__[1:]: f for f in (_every_other, _behind_others, _transposed, _expanded)}


def _cache_call(q, k, v, kc, vc, n):
    with torch.no_grad():
        return tf.kv_cache_attention(q, k, v, kc, vc, n), kc, vc


def _run(op, tensors, backend, way=None, dtype=None):
    """Outputs and gradients. way: of the arguments and of the gradients that arrive."""
    call, gradients = CALLS[op][0] or _cache_call, op != "kv_cache_attention"
    leaves = {}
    for name, t in tensors.items():
        t = t.clone()
        if dtype is not None and t.is_floating_point():
            t = t.to(dtype)
        t = WAYS[way](t) if way else t
        constant = not gradients or (op, name) in CONSTANT
        leaves[name] = t.requires_grad_() if t.is_floating_point() and not constant else t
    wanted = {n: t for n, t in leaves.items() if t.requires_grad}
    torch.manual_seed(5)
    with tf.backend(backend):
        outputs = call(**leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        found = {f"output {i}": o.detach().clone() for i, o in enumerate(outputs)}
        if gradients:
            arriving = []
            for o in outputs:
                g = torch.linspace(-1, 1, o.numel()).view(o.shape)
                arriving.append(WAYS[way](g.to(o.dtype)) if way and way != "expanded" else g.to(o.dtype))
            grads = torch.autograd.grad(outputs, list(wanted.values()), arriving)
            found |= {f"gradient of {n}": g for n, g in zip(wanted, grads)}
    return found


@pytest.fixture(scope="module", params=["triton", "cuda"])
def machine(request):
    if request.param == "triton":
        return contextlib.nullcontext if torch.cuda.is_available() else triton_interpreter.active, "triton"
    return cuda_emulator.active, "cuda"


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("op", list(CALLS))
def test_any_strides(op, way, machine):
    running, backend = machine
    if backend == "cuda" and op not in OF_CUDA:
        pytest.skip(f"the CUDA backend has no {op}")
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("the interpreter's to check: these tensors are on the CPU")
    tensors = CALLS[op][1]()
    if way == "expanded":
        tensors = {n: WAYS[way](t).contiguous() for n, t in tensors.items()}
    with running():
        ours = _run(op, tensors, backend, way)
    truth, plain = _run(op, tensors, "eager", dtype=torch.float64), _run(op, tensors, "eager")
    for name, t in ours.items():
        assert_as_accurate(t, truth[name], plain[name], GRADIENT if name.startswith("grad") else OUTPUT, name)
