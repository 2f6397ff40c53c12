"""Every tensor argument of every op of the GPU backends, forward and backward, with any strides and offsets."""

import contextlib

import cuda_emulator
import pytest
import torch
import triton_interpreter
from numerics import GRADIENT, OUTPUT, assert_as_accurate

import transformer_fast as tf

HALF = torch.float16
SMALL, LARGE = (9, 24), (300, 1100)  # rows and width; the large one, on a GPU, has several tiles and programs


def _vector(n):
    return torch.rand(n) + 0.5


def _integers(*values):
    return torch.tensor(values)


def _heads(heads, length, dtype=HALF):
    return torch.randn(2, heads, length, 16).to(dtype)


# op -> its call and its tensors. Floating-point tensors get gradients if `gradients` says so.
CALLS = {
    "layer_norm": (lambda x, w, b: tf.layer_norm(x, w.shape, w, b), lambda n, m: {
        "x": torch.randn(n, 2, m), "w": _vector(m), "b": _vector(m)}),
    "rms_norm": (lambda x, w: tf.rms_norm(x, w.shape, w), lambda n, m: {
        "x": torch.randn(n, m).half(), "w": _vector(m)}),
    "add_layer_norm": (lambda x, r, w, b: tf.add_layer_norm(x, r, w, b, dropout_p=0.2), lambda n, m: {
        "x": torch.randn(n, m), "r": torch.randn(n, m), "w": _vector(m), "b": _vector(m)}),
    "bias_activation": (lambda x, b, g: tf.bias_activation(x, b, "gelu", gate=g), lambda n, m: {
        "x": torch.randn(n, m), "b": _vector(m), "g": torch.randn(n, m)}),
    "dropout": (lambda x: tf.dropout(x, 0.3), lambda n, m: {"x": torch.randn(n, m)}),
    "cross_entropy": (
        lambda x, t, w: tf.cross_entropy(x, t, w, label_smoothing=0.1, reduction="none"), lambda n, m: {
            "x": torch.randn(n, m), "t": torch.arange(n), "w": _vector(m)}),
    "embedding_layer_norm": (
        lambda i, word, p, position, k, kind, w, b: tf.embedding_layer_norm(
            i, word, p, position, k, kind, w, b, dropout_p=0.2), lambda n, m: {
            "i": torch.arange(2 * n).view(2, n) % 12, "word": torch.randn(12, m),
            "p": torch.arange(2 * n).view(2, n) % 5, "position": torch.randn(5, m),
            "k": torch.arange(2 * n).view(2, n) % 2, "kind": torch.randn(2, m), "w": _vector(m), "b": _vector(m)}),
    "additive_attention": (
        lambda q, k, v, w, b, m, n: tf.additive_attention(q, k, v, w, b, attn_mask=m, key_lengths=n), lambda n, m: {
            "q": torch.randn(2, 3, m), "k": torch.randn(2, n, m), "v": torch.randn(2, n, 8), "w": _vector(m),
            "b": _vector(m), "m": torch.rand(2, 3, n) > 0.3, "n": _integers(n, 2)}),
    "attention": (
        lambda q, k, v, m, b, n: tf.scaled_dot_product_attention(q, k, v, attn_mask=m, bias=b, key_lengths=n,
                                                                 enable_gqa=True), lambda n, m: {
            "q": _heads(4, 20), "k": _heads(2, 2 * n), "v": _heads(2, 2 * n), "m": torch.rand(2, 1, 20, 2 * n) > 0.3,
            "b": torch.randn(2, 4, 20, 2 * n).half(), "n": _integers(2 * n, 7)}),
    "attention_relative": (
        lambda q, k, v, t: tf.scaled_dot_product_attention(q, k, v, is_causal=True,
                                                           relative_bias=tf.RelativeBias(t, 12, False)), lambda n, m: {
            "q": _heads(2, 2 * n), "k": _heads(2, 2 * n), "v": _heads(2, 2 * n), "t": torch.randn(8, 2)}),
    "varlen_attention": (
        lambda q, k, v, a, b: tf.varlen_attention(q, k, v, a, b, max_seqlen_q=20, max_seqlen_k=21), lambda n, m: {
            **{n: torch.randn(40, 2, 16).half() for n in "qkv"}, "a": _integers(0, 20, 40).int(),
            "b": _integers(0, 19, 40).int()}),
    "qkv_attention": (
        lambda x, a: tf.ops.qkv_attention(x, a, max_seqlen=22), lambda n, m: {
            "x": torch.randn(40, 3, 2, 16).half(), "a": _integers(0, 22, 40).int()}),
    "rotary_embedding": (
        lambda x, c, s, p: tf.ops.rotary_embedding(x, c, s, p), lambda n, m: {
            "x": torch.randn(2, n, 3, 16), "c": torch.randn(9, 6), "s": torch.randn(9, 6),
            "p": torch.arange(2 * n).view(2, n) % 9}),
    "rotary_cache_append": (None, lambda n, m: {
        "q": _heads(2, 2), "k": _heads(1, 2), "v": _heads(1, 2), "kc": _heads(1, 2 * n), "vc": _heads(1, 2 * n),
        "n": _integers(5, 2 * n - 2), "c": torch.randn(3 * n, 6), "s": torch.randn(3 * n, 6),
        "p": torch.arange(4).view(2, 2), "qw": _vector(16), "kw": _vector(16)}),
    "kv_cache_attention": (None, lambda n, m: {
        "q": _heads(2, 1), "k": _heads(2, 1), "v": _heads(2, 1), "kc": _heads(2, 3 * n), "vc": _heads(2, 3 * n),
        "n": _integers(12, 3 * n - 1)}),
}  # fmt: skip
SINGLE = (
    "layer_norm",
    "rms_norm",
    "add_layer_norm",
    "rotary_embedding",
    "bias_activation",
)  # the cuda backend's other op is 16-bit attention
IN_PLACE = ("kv_cache_attention", "rotary_cache_append")  # without gradients
OF_CUDA = (*SINGLE, *IN_PLACE, "attention", "attention_relative", "varlen_attention", "qkv_attention")


CONSTANT = (("cross_entropy", "w"), ("rotary_embedding", "c"), ("rotary_embedding", "s"))  # get no gradient


def _poisoned(shape, like):
    return torch.full(shape, float("nan") if like.is_floating_point() else 1, dtype=like.dtype, device=like.device)


def _every_other(t):
    room = _poisoned((*t.shape, 2), t)
    room[..., 1] = t
    return room[..., 1]


def _behind_others(t):
    room = _poisoned((t.numel() + 3,), t)
    room[3:] = t.flatten()
    return room[3:].view(t.shape)


def _transposed(t):
    return t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() > 1 else _every_other(t)


def _expanded(t):
    """Expand vectors from one value. Not other tensors: a row of equal values has no variance, so its norm is noise."""
    return t[:1].expand(t.shape) if t.is_floating_point() and t.dim() == 1 else _every_other(t)


WAYS = {f.__name__[1:]: f for f in (_every_other, _behind_others, _transposed, _expanded)}


def _cache_call(q, k, v, kc, vc, n, c=None, s=None, p=None, qw=None, kw=None):
    with torch.no_grad():
        if c is None:
            return tf.kv_cache_attention(q, k, v, kc, vc, n), kc, vc
        return tf.rotary_cache_append(q, k, v, kc, vc, n, c, s, p, query_weight=qw, key_weight=kw), kc, vc


def _run(op, tensors, backend, way=None, dtype=None):
    """Outputs and gradients. way: the layout of the arguments and of the incoming gradients."""
    call, gradients = CALLS[op][0] or _cache_call, op not in IN_PLACE
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
            arriving, drawn = [], torch.Generator().manual_seed(7)
            for o in outputs:
                g = torch.randn(o.shape, generator=drawn).half().to(o.device)  # the same in every dtype
                arriving.append(WAYS[way](g.to(o.dtype)) if way and way != "expanded" else g.to(o.dtype))
            grads = torch.autograd.grad(outputs, list(wanted.values()), arriving)
            found |= {f"gradient of {n}": g for n, g in zip(wanted, grads)}
    return found


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("op", list(CALLS))
def test_any_strides(op, way, backend, device):
    if backend == "cuda" and op not in OF_CUDA:
        pytest.skip(f"the CUDA backend has no {op}")
    machine = triton_interpreter.active if backend == "triton" else cuda_emulator.active
    for sizes in (SMALL, LARGE) if device == "cuda" else (SMALL,):
        tensors = {n: t.to(device) for n, t in CALLS[op][1](*sizes).items()}
        if way == "expanded":
            tensors = {n: WAYS[way](t).contiguous() for n, t in tensors.items()}
        with contextlib.nullcontext() if device == "cuda" else machine():
            ours = _run(op, tensors, backend, way)
        truth, plain = _run(op, tensors, "eager", dtype=torch.float64), _run(op, tensors, "eager")
        for name, t in ours.items():
            factor = GRADIENT if name.startswith("grad") else OUTPUT
            assert_as_accurate(t, truth[name], plain[name], factor, f"{name}, {sizes}")
