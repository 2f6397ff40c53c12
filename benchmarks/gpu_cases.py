"""The GPU cases, each with its peers and its bar.

Attention at a constant 16 k tokens, padded batches, T5's bias, dropout, decoding with a cache, norms, gated
activations, the loss, and the host time of calls on tiny tensors. `device` is "cuda", except in tests, which run small
versions of every case on the CPU. But for the host time, CUDA graphs are replayed.
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import transformer_fast as tf

from . import shapes
from .calls import backward_only, cuda_candidate, forward_only, replayed, with_gradients
from .case import OURS, Bar, Candidate, Case, everything
from .decoder_op_cases import decoder_op_cases
from .host_cases import host_cases

__all__ = ["gpu_cases"]

BF16 = torch.bfloat16
DROPOUT = 0.1
SDPA, FLASH, CUDNN, FLEX = "torch SDPA", "SDPA flash", "SDPA cuDNN", "flex_attention"
TORCH, COMPILE, LIGER = "torch", "torch.compile", "Liger"
FILL = 0.4  # share of real tokens in a padded batch


def gpu_cases(device: str) -> list[Case]:
    cases = []
    for shape in shapes.ATTENTION_CUDA:
        for causal in (False, True):
            cases += [make(shape, causal, device) for make in (_attention_forward, _attention_backward)]
    cases += [_padded(shape, device) for shape in shapes.PADDED_CUDA]
    for shape in shapes.T5_CUDA:
        cases += [_t5(shape, training, device) for training in (False, True)]
    cases += [_dropout(shape, device) for shape in shapes.DROPOUT_CUDA]
    cases += [_decode(batch, context, device) for batch, context in shapes.DECODE_CUDA]
    for rows_width in shapes.NORM_CUDA:
        for make in (_layer_norm, _rms_norm, _add_layer_norm):
            cases += [make(rows_width, training, device) for training in (False, True)]
    cases += decoder_op_cases(device, "bf16", shapes.GATED_CUDA, shapes.APPEND_CUDA)
    cases += [_cross_entropy(size, device) for size in shapes.LOSS_CUDA]
    return [*cases, *host_cases(device)]


def _random(device: str, *shape: int, grad: bool = False) -> torch.Tensor:
    return torch.randn(shape, device=device).to(BF16).requires_grad_(grad)


# ---- attention ---------------------------------------------------------------------------------------
def _qkv(shape: shapes.AttentionShape, device: str, tiny: bool, grad: bool) -> SimpleNamespace:
    """q, k, v (B, H, S, D) with the memory layout (B, S, H, D), as in models."""
    b, h, s, d = (2, 2, 32, 16) if tiny else shape
    torch.manual_seed(0)
    leaves = [_random(device, b, s, h, d, grad=grad) for _ in range(3)]
    q, k, v = (t.transpose(1, 2) for t in leaves)
    return SimpleNamespace(q=q, k=k, v=v, leaves=leaves, upstream=_random(device, b, s, h, d).transpose(1, 2))


def _ours(x, causal):
    return tf.scaled_dot_product_attention(x.q, x.k, x.v, is_causal=causal)


def _torch(x, causal, only: SDPBackend | None = None):
    if only is None:
        return F.scaled_dot_product_attention(x.q, x.k, x.v, is_causal=causal)
    with sdpa_kernel(only):
        return F.scaled_dot_product_attention(x.q, x.k, x.v, is_causal=causal)


def _flex(wrap: Callable, causal: bool, score: Callable | None = None) -> Callable:
    def prepare(x):
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        length = x.q.shape[2]
        mask = None
        if causal:
            mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=x.q.device.type)
        compiled = torch.compile(flex_attention, dynamic=False)
        score_mod = score(x) if score else None
        return wrap(lambda x: compiled(x.q, x.k, x.v, score_mod=score_mod, block_mask=mask))(x)

    return prepare


def _attention(kind: str, shape, causal: bool, device: str, wrap: Callable, flops: float, tensors: int) -> Case:
    b, h, s, d = shape
    cuda = {"works_on": ("cuda",)}
    return Case(
        name=f"attention-{kind}/bf16-{shape.name}{'-causal' if causal else ''}",
        title=f"attention {kind} bf16, {tuple(shape)}{', causal' if causal else ''}",
        inputs=lambda tiny: _qkv(shape, device, tiny, kind == "backward"),
        candidates=(
            Candidate(OURS, wrap(partial(_ours, causal=causal))),
            cuda_candidate(wrap(partial(_ours, causal=causal))),
            Candidate(FLASH, wrap(partial(_torch, causal=causal, only=SDPBackend.FLASH_ATTENTION))),
            Candidate(CUDNN, wrap(partial(_torch, causal=causal, only=SDPBackend.CUDNN_ATTENTION)), **cuda),
            Candidate(FLEX, _flex(wrap, causal), slow=True, **cuda),
        ),
        peer=FLASH,
        dtype="bf16",
        shape=f"{tuple(shape)}",
        flops=flops * b * h * s * s * d * (0.5 if causal else 1.0),
        bytes=2.0 * tensors * b * h * s * d,
        bar=Bar(1.0),
    )


def _attention_forward(shape, causal: bool, device: str) -> Case:
    return _attention("forward", shape, causal, device, replayed(forward_only, device), 4.0, 4)


def _attention_backward(shape, causal: bool, device: str) -> Case:
    return _attention("backward", shape, causal, device, replayed(backward_only, device), 10.0, 8)


def _padded(shape: shapes.AttentionShape, device: str) -> Case:
    """A BERT layer's attention on sentences padded to the longest. The peers compute the padding too."""
    b, h, s, d = shape
    lengths = shapes.ragged_lengths(b, mean=round(FILL * s), longest=s)
    wrap = replayed(forward_only, device)

    def inputs(tiny: bool):
        x = _qkv(shape, device, tiny, False)
        mine = [x.q.shape[2], 9][: x.q.shape[0]] if tiny else lengths
        x.lengths = torch.tensor(mine, device=device)
        x.mask = (torch.arange(x.q.shape[2], device=device) < x.lengths[:, None])[:, None, None, :]
        return x

    def ours(x):
        return tf.scaled_dot_product_attention(x.q, x.k, x.v, key_lengths=x.lengths)

    def real(out, x):
        return out.transpose(1, 2)[x.mask[:, 0, 0]]

    return Case(
        name=f"attention-padded/bf16-{shape.name}",
        title=f"attention bf16, {tuple(shape)}, {FILL:.0%} of the tokens real",
        inputs=inputs,
        candidates=(
            Candidate(OURS, wrap(ours)),
            cuda_candidate(wrap(ours)),
            Candidate(SDPA, wrap(lambda x: F.scaled_dot_product_attention(x.q, x.k, x.v, x.mask))),
        ),
        peer=SDPA,
        dtype="bf16",
        shape=f"{tuple(shape)}",
        flops=4.0 * h * d * sum(n * n for n in lengths),
        bytes=2.0 * 4 * h * d * sum(lengths),
        bar=Bar(2.0),
        result=real,
    )


# ---- T5 ----------------------------------------------------------------------------------------------
def _buckets(x) -> torch.Tensor:
    """The bucket of every (query, key), as T5 computes it in each forward pass."""
    from transformer_fast.backends.eager import relative_buckets

    position = torch.arange(x.q.shape[2], device=x.q.device)
    return relative_buckets(position[None] - position[:, None], x.table.shape[0], 128, True)


def _t5_flex(x) -> Callable:
    buckets = _buckets(x)
    return lambda score, b, h, i, j: score + x.table[buckets[i, j], h]


def _t5(shape: shapes.AttentionShape, training: bool, device: str) -> Case:
    """T5's bias from its table in each call. The peers build the bias (1, H, S, S), with gradients to the table."""
    b, h, s, d = shape
    wrap = replayed(with_gradients if training else forward_only, device)
    kind = "training" if training else "forward"

    def inputs(tiny: bool):
        x = _qkv(shape, device, tiny, training)
        x.table = _random(device, 32, x.q.shape[1], grad=training)
        x.leaves.append(x.table)
        return x

    def ours(x):
        bias = tf.RelativeBias(x.table, 128, True)
        return tf.scaled_dot_product_attention(x.q, x.k, x.v, scale=1.0, relative_bias=bias)

    def materialised(x):
        bias = x.table[_buckets(x)].permute(2, 0, 1)[None]
        return F.scaled_dot_product_attention(x.q, x.k, x.v, bias, scale=1.0)

    return Case(
        name=f"t5-bias-{kind}/bf16-{shape.name}",
        title=f"attention with T5's relative bias {'forward + backward' if training else 'forward'} bf16, {shape}",
        inputs=inputs,
        candidates=(
            Candidate(OURS, wrap(ours)),
            cuda_candidate(wrap(ours)),
            Candidate(SDPA, wrap(materialised)),
            Candidate(FLEX, _flex(wrap, False, _t5_flex), slow=True, comparable=False, works_on=("cuda",)),
        ),
        peer=SDPA,
        dtype="bf16",
        shape=f"{tuple(shape)}",
        flops=(14.0 if training else 4.0) * b * h * s * s * d,
        bytes=2.0 * (12 if training else 4) * b * h * s * d,
        bar=Bar(3.0) if s >= 1024 else None,
    )


def _dropout(shape: shapes.AttentionShape, device: str) -> Case:
    (b, h, s, d), wrap = shape, replayed(with_gradients, device)

    def ours(x):
        return tf.scaled_dot_product_attention(x.q, x.k, x.v, dropout_p=DROPOUT)

    return Case(
        name=f"attention-dropout/bf16-{shape.name}",
        title=f"attention with dropout, forward + backward bf16, {tuple(shape)}",
        inputs=lambda tiny: _qkv(shape, device, tiny, True),
        candidates=(
            Candidate(OURS, wrap(ours)),
            cuda_candidate(wrap(ours)),
            Candidate(SDPA, wrap(lambda x: F.scaled_dot_product_attention(x.q, x.k, x.v, dropout_p=DROPOUT))),
        ),
        peer=SDPA,
        dtype="bf16",
        shape=f"{tuple(shape)}",
        flops=14.0 * b * h * s * s * d,
        bytes=2.0 * 12 * b * h * s * d,
        bar=Bar(1.0),
        result=None,
    )


# ---- decoding ----------------------------------------------------------------------------------------
def _decode(batch: int, context: int, device: str) -> Case:
    """One token per sequence: append to the cache, attend to it. GPT-2's heads. On a GPU, a graph is replayed."""
    h, d, step = 12, 64, replayed(forward_only, device)

    def inputs(tiny: bool):
        b, length = (2, 24) if tiny else (batch, context)
        torch.manual_seed(0)
        x = SimpleNamespace(
            q=_random(device, b, h, 1, d), k=_random(device, b, h, 1, d), v=_random(device, b, h, 1, d),
            keys=_random(device, b, h, length, d), values=_random(device, b, h, length, d),
        )  # fmt: skip
        x.last = torch.full((b,), length - 1, device=device)
        return x

    def ours(x):
        return tf.kv_cache_attention(x.q, x.k, x.v, x.keys, x.values, x.last)

    def torch_static(x):
        x.keys[:, :, -1:] = x.k
        x.values[:, :, -1:] = x.v
        return F.scaled_dot_product_attention(x.q, x.keys, x.values)

    return Case(
        name=f"decode/bf16-b{batch}-s{context}",
        title=f"one decoding step bf16, {batch} sequences, context {context}",
        inputs=inputs,
        candidates=(
            Candidate(OURS, step(ours)),
            cuda_candidate(step(ours)),
            Candidate(SDPA, step(torch_static)),
        ),
        peer=SDPA,
        dtype="bf16",
        shape=f"({batch}, {h}, {context}, {d})",
        flops=4.0 * batch * h * context * d,
        bytes=2.0 * 2 * batch * h * context * d,
        bar=Bar(1.0),
    )


# ---- norms -------------------------------------------------------------------------------------------
def _liger(function: str, module: str) -> Callable:
    import importlib

    return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), function).apply


def _norm(what: str, rows_width, training: bool, device: str, ours, theirs, liger, *, vectors: int, residual=False):
    """The forward, or the backward alone; on a GPU a graph is replayed."""
    rows, width = rows_width
    kind = "backward" if training else "forward"
    wrap = replayed(backward_only if training else forward_only, device)
    tensors = (3 if residual else 2) if not training else (4 if residual else 3)

    def inputs(tiny: bool):
        n, w = (8, 64) if tiny else rows_width
        torch.manual_seed(0)
        sizes = [(n, w)] * (2 if residual else 1) + [(w,)] * vectors
        leaves = [_random(device, *size, grad=training) for size in sizes]
        return SimpleNamespace(leaves=leaves, upstream=_random(device, n, w), width=w)

    candidates = [
        Candidate(OURS, wrap(ours)),
        cuda_candidate(wrap(ours)),
        Candidate(TORCH, wrap(theirs)),
        Candidate(COMPILE, lambda x: wrap(torch.compile(theirs, dynamic=False))(x), slow=True, works_on=("cuda",)),
    ]
    if liger is not None:
        candidates.append(Candidate(LIGER, lambda x: wrap(liger())(x), ("liger_kernel",), works_on=("cuda",)))
    return Case(
        name=f"norm-{kind}/bf16-{what.replace('_', '-')}-{rows}x{width}",
        title=f"{what} {kind} bf16, {rows_width}",
        inputs=inputs,
        candidates=tuple(candidates),
        peer=TORCH,
        dtype="bf16",
        shape=f"{rows_width}",
        bytes=2.0 * tensors * rows * width,
        bar=Bar(1.0, ceiling=0.75 if training else 0.88, ahead_of=(COMPILE, LIGER)),
    )


def _layer_norm(rows_width, training: bool, device: str) -> Case:
    def liger():
        apply = _liger("LigerLayerNormFunction", "layer_norm")
        return lambda x: apply(*x.leaves, 1e-5)

    return _norm(
        "layer_norm", rows_width, training, device, lambda x: tf.layer_norm(x.leaves[0], (x.width,), *x.leaves[1:]),
        lambda x: F.layer_norm(x.leaves[0], (x.width,), *x.leaves[1:]), liger, vectors=2,
    )  # fmt: skip


def _rms_norm(rows_width, training: bool, device: str) -> Case:
    def liger():
        apply = _liger("LigerRMSNormFunction", "rms_norm")
        return lambda x: apply(*x.leaves, 1e-6, 0.0, "llama", False)

    return _norm(
        "rms_norm", rows_width, training, device, lambda x: tf.rms_norm(x.leaves[0], (x.width,), x.leaves[1], 1e-6),
        lambda x: F.rms_norm(x.leaves[0], (x.width,), x.leaves[1], 1e-6), liger, vectors=1,
    )  # fmt: skip


def _add_layer_norm(rows_width, training: bool, device: str) -> Case:
    return _norm(
        "add_layer_norm", rows_width, training, device, lambda x: tf.add_layer_norm(*x.leaves, return_sum=False),
        lambda x: F.layer_norm(x.leaves[0] + x.leaves[1], (x.width,), *x.leaves[2:]), None, vectors=2, residual=True,
    )  # fmt: skip


# ---- loss --------------------------------------------------------------------------------------------
def _cross_entropy(size: tuple[int, int], device: str) -> Case:
    """On a GPU a graph is replayed. Liger reads the number of targets on the CPU, so it cannot be captured."""
    (rows, classes), plain = size, f"{LIGER}, not captured"
    wrap = replayed(with_gradients, device)

    def inputs(tiny: bool):
        n, c = (8, 100) if tiny else size
        torch.manual_seed(0)
        logits = _random(device, n, c, grad=True)
        target = torch.randint(c, (n,), device=device)
        target[::7] = -100
        return SimpleNamespace(logits=logits, leaves=[logits], target=target, upstream=torch.ones((), device=device))

    def liger(x):
        apply = _liger("LigerCrossEntropyFunction", "cross_entropy")

        def call():
            # Liger's gradient overwrites the logits, so each call gets a copy, like a model's new logits.
            logits = x.logits.detach().clone().requires_grad_()
            loss = apply(logits, x.target, None, -100)
            loss = loss[0] if isinstance(loss, tuple) else loss
            return loss, *torch.autograd.grad(loss, logits)

        return call

    return Case(
        name=f"cross-entropy/bf16-{rows}x{classes}",
        title=f"cross entropy forward + backward bf16, {size}",
        inputs=inputs,
        candidates=(
            Candidate(OURS, wrap(lambda x: tf.cross_entropy(x.logits, x.target).to(x.upstream.dtype))),
            Candidate(TORCH, wrap(lambda x: F.cross_entropy(x.logits.float(), x.target))),
            Candidate(plain, liger, ("liger_kernel",), works_on=("cuda",)),
        ),
        peer=TORCH,
        dtype="bf16",
        shape=f"{size}",
        bytes=2.0 * 3 * rows * classes,
        bar=Bar(1.0, ahead_of=(plain,)),
        result=everything,
    )
