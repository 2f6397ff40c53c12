"""Cases of the ops: attention, norms, activations, and the overhead of a call over its bare kernel."""

from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import transformer_fast as tf

from . import shapes
from .calls import forward_only, with_gradients
from .case import OURS, Bar, Candidate, Case, Unavailable, everything
from .decoder_op_cases import decoder_op_cases
from .gpu_cases import gpu_cases

__all__ = ["op_cases"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DROPOUT = 0.1
TORCH = "torch"
SDPA = "torch SDPA"

# {(length, causal): speed-up over torch SDPA in fp32}; bfloat16 has a single bar.
_ATTENTION_BARS = {(128, False): 1.3, (512, False): 1.1, (2048, False): 1.0, (512, True): 1.8, (2048, True): 1.15}
_ATTENTION_BAR_BF16 = 1.5


def op_cases(device: str) -> list[Case]:
    cases = []
    if device == "cuda":
        return [*gpu_cases(device), *_overhead(device)]
    for dtype in ("fp32", "bf16"):
        for shape in shapes.ATTENTION_CPU:
            for causal in (False, True):
                cases.append(_attention_forward(shape, dtype, causal, device))
    for shape in shapes.ATTENTION_CPU:
        for feature in ("plain", "causal", "dropout", "bias gradient"):
            cases.append(_attention_training(shape, "fp32", feature, device))
    makes = (_layer_norm, _add_layer_norm, _dropout_add_layer_norm, _bias_gelu, _gelu_tanh, _rotary)
    cases += [make(shapes.POINTWISE, "fp32", device) for make in makes]
    cases += decoder_op_cases(device, "fp32", shapes.GATED_CPU, shapes.APPEND_CPU)
    return [*cases, *_overhead(device)]


# ---- attention ---------------------------------------------------------------------------------------
def _attention_inputs(shape: shapes.AttentionShape, dtype: str, device: str, *, grad: bool = False, bias: bool = False):
    """q, k, v (B, H, S, D) with the memory layout (B, S, H, D), as in models."""

    def make(tiny: bool):
        b, h, s, d = (1, 1, 16, shape.head_dim) if tiny else shape
        torch.manual_seed(0)
        leaves = [torch.randn(b, s, h, d, device=device).to(DTYPES[dtype]).requires_grad_(grad) for _ in range(3)]
        q, k, v = (t.transpose(1, 2) for t in leaves)
        if bias:
            leaves.append(torch.randn(1, h, s, s, device=device).to(DTYPES[dtype]).requires_grad_(grad))
        upstream = torch.randn(b, s, h, d, device=device).to(DTYPES[dtype]).transpose(1, 2) if grad else None
        return SimpleNamespace(q=q, k=k, v=v, leaves=leaves, bias=leaves[3] if bias else None, upstream=upstream)

    return make


def _attention_bytes(shape: shapes.AttentionShape, dtype: str, tensors: int) -> float:
    b, h, s, d = shape
    return float(tensors * b * h * s * d * DTYPES[dtype].itemsize)


def _attention_flops(shape: shapes.AttentionShape, causal: bool) -> float:
    b, h, s, d = shape
    return 4.0 * b * h * s * s * d * (0.5 if causal else 1.0)


def _sdpa_candidates(wrap: Callable, causal: bool, dropout_p: float = 0.0) -> tuple[Candidate, ...]:
    def attend(op):
        return lambda x: op(x.q, x.k, x.v, x.bias, dropout_p, causal)

    return (
        Candidate(OURS, wrap(attend(tf.scaled_dot_product_attention))),
        Candidate(SDPA, wrap(attend(F.scaled_dot_product_attention))),
    )


def _attention_forward(shape, dtype: str, causal: bool, device: str) -> Case:
    speedup = None
    if device == "cpu":
        speedup = _ATTENTION_BARS.get((shape.length, causal))
        if speedup and dtype == "bf16":
            speedup = _ATTENTION_BAR_BF16
    return Case(
        name=f"attention-forward/{dtype}-{shape.name}{'-causal' if causal else ''}",
        title=f"attention forward {dtype}, {tuple(shape)}{', causal' if causal else ''}",
        inputs=_attention_inputs(shape, dtype, device),
        candidates=_sdpa_candidates(forward_only, causal),
        peer=SDPA,
        dtype=dtype,
        shape=f"{tuple(shape)}",
        flops=_attention_flops(shape, causal),
        bytes=_attention_bytes(shape, dtype, 4),
        bar=Bar(speedup) if speedup else None,
    )


def _attention_training(shape, dtype: str, feature: str, device: str) -> Case:
    causal, dropout_p, bias = feature == "causal", DROPOUT if feature == "dropout" else 0.0, feature == "bias gradient"
    speedup = {"plain": 1.1, "dropout": 5.0, "bias gradient": 3.0}.get(feature) if device == "cpu" else None
    return Case(
        name=f"attention-training/{dtype}-{shape.name}-{feature.replace(' ', '-')}",
        title=f"attention forward + backward {dtype}, {tuple(shape)}, {feature}",
        inputs=_attention_inputs(shape, dtype, device, grad=True, bias=bias),
        candidates=_sdpa_candidates(with_gradients, causal, dropout_p),
        peer=SDPA,
        dtype=dtype,
        shape=f"{tuple(shape)}",
        flops=3.5 * _attention_flops(shape, causal),
        bytes=_attention_bytes(shape, dtype, 12),
        bar=Bar(speedup) if speedup else None,
        result=None if dropout_p else everything,
    )


# ---- norms and activations ---------------------------------------------------------------------------
def _pointwise_inputs(rows_width, dtype: str, device: str, *, vectors: int, residual: bool = False, grad: bool = True):
    """x, optionally a residual, and `vectors` parameters of the row's width."""

    def make(tiny: bool):
        rows, width = (4, 64) if tiny else rows_width
        torch.manual_seed(0)
        sizes = [(rows, width)] * (2 if residual else 1) + [(width,)] * vectors
        leaves = [torch.randn(size, device=device).to(DTYPES[dtype]).requires_grad_(grad) for size in sizes]
        upstream = torch.randn(rows, width, device=device).to(DTYPES[dtype])
        return SimpleNamespace(leaves=leaves, upstream=upstream, width=width)

    return make


def _pointwise_case(
    what: str,
    rows_width: tuple[int, int],
    dtype: str,
    device: str,
    ours: Callable,
    theirs: Callable,
    *,
    tensors: int,
    speedup: float | None,
    vectors: int,
    residual: bool = False,
    grad: bool = True,
    agree: bool = True,
) -> Case:
    """tensors: the least number of activations read or written; vectors: of parameters; agree: compare the results."""
    rows, width = rows_width
    wrap = with_gradients if grad else forward_only

    def compiled(inputs):
        return wrap(torch.compile(theirs, dynamic=False))(inputs)

    return Case(
        name=f"pointwise/{dtype}-{what.replace(' + ', '-').replace('_', '-')}-{rows}x{width}",
        title=f"{what} {'forward + backward' if grad else 'forward'} {dtype}, {rows_width}",
        inputs=_pointwise_inputs(rows_width, dtype, device, vectors=vectors, residual=residual, grad=grad),
        candidates=(
            Candidate(OURS, wrap(ours)),
            Candidate(TORCH, wrap(theirs)),
            Candidate("torch.compile", compiled, slow=True),
        ),
        peer=TORCH,
        dtype=dtype,
        shape=f"{rows_width}",
        bytes=float(tensors * rows * width * DTYPES[dtype].itemsize),
        bar=Bar(speedup) if speedup and device == "cpu" else None,
        result=everything if agree else None,
    )


def _layer_norm(rows_width, dtype: str, device: str) -> Case:
    def ours(x):
        return tf.layer_norm(x.leaves[0], (x.width,), x.leaves[1], x.leaves[2])

    def theirs(x):
        return F.layer_norm(x.leaves[0], (x.width,), x.leaves[1], x.leaves[2])

    return _pointwise_case("layer_norm", rows_width, dtype, device, ours, theirs, tensors=5, speedup=2.0, vectors=2)


def _add_layer_norm(rows_width, dtype: str, device: str) -> Case:
    def ours(x):
        return tf.add_layer_norm(*x.leaves, return_sum=False)

    def theirs(x):
        return F.layer_norm(x.leaves[0] + x.leaves[1], (x.width,), x.leaves[2], x.leaves[3])

    return _pointwise_case(
        "add_layer_norm", rows_width, dtype, device, ours, theirs, tensors=7, speedup=3.0, vectors=2, residual=True
    )


def _dropout_add_layer_norm(rows_width, dtype: str, device: str) -> Case:
    def ours(x):
        return tf.add_layer_norm(*x.leaves, dropout_p=DROPOUT, return_sum=False)

    def theirs(x):
        return F.layer_norm(F.dropout(x.leaves[0], DROPOUT) + x.leaves[1], (x.width,), x.leaves[2], x.leaves[3])

    return _pointwise_case(
        "dropout + add_layer_norm", rows_width, dtype, device, ours, theirs, tensors=8, speedup=None, vectors=2,
        residual=True, agree=False,
    )  # fmt: skip


def _bias_gelu(rows_width, dtype: str, device: str) -> Case:
    def ours(x):
        return tf.bias_activation(x.leaves[0], x.leaves[1], "gelu")

    def theirs(x):
        return F.gelu(x.leaves[0] + x.leaves[1])

    return _pointwise_case("bias + gelu", rows_width, dtype, device, ours, theirs, tensors=5, speedup=2.5, vectors=1)


def _gelu_tanh(rows_width, dtype: str, device: str) -> Case:
    def ours(x):
        return tf.bias_activation(x.leaves[0], None, "gelu_tanh")

    def theirs(x):
        return F.gelu(x.leaves[0], approximate="tanh")

    return _pointwise_case(
        "gelu_tanh", rows_width, dtype, device, ours, theirs, tensors=2, speedup=4.0, vectors=0, grad=False
    )


def _rotary(rows_width, dtype: str, device: str) -> Case:
    """Queries and keys with head dim 64, rows of one sequence, forward and backward."""
    head = 64

    def angles(x):
        rows = x.leaves[0].shape[0]
        return torch.arange(rows, device=device)[:, None] * 1e4 ** -torch.linspace(0, 1, head // 2, device=device)

    def ours(x):
        a = angles(x)
        return tf.rotary_embedding(x.leaves[0].view(1, x.leaves[0].shape[0], -1, head), a.cos(), a.sin()).flatten(2)[0]

    def theirs(x):
        a = angles(x)
        cos, sin = (torch.cat((t, t), -1)[:, None].to(x.leaves[0].dtype) for t in (a.cos(), a.sin()))
        heads = x.leaves[0].unflatten(-1, (-1, head))
        half = torch.cat((-heads[..., head // 2 :], heads[..., : head // 2]), -1)
        return (heads * cos + half * sin).flatten(1)

    return _pointwise_case(
        "rotary embedding", rows_width, dtype, device, ours, theirs, tensors=4, speedup=2.0, vectors=0
    )


# ---- the overhead of a call over its kernel ----------------------------------------------------------
BARE = "bare kernel"


def _overhead(device: str) -> list[Case]:
    """One small call of each op without gradients: its time minus that of its bare kernel."""
    x, w, b = (torch.randn(size, device=device) for size in ((8, 768), (768,), (768,)))
    q = torch.randn(1, 8, 12, 64, device=device).transpose(1, 2)
    qkv, cu = torch.randn(8, 3, 12, 64, device=device), torch.tensor([0, 8], dtype=torch.int32, device=device)
    calls = {
        "layer_norm": (lambda: tf.layer_norm(x, (768,), w, b), lambda: F.layer_norm(x, (768,), w, b)),
        "add_layer_norm": (lambda: tf.add_layer_norm(x, x, w, b), lambda: F.layer_norm(x + x, (768,), w, b)),
        "rms_norm": (lambda: tf.rms_norm(x, (768,), w), lambda: F.rms_norm(x, (768,), w)),
        "bias_activation": (lambda: tf.bias_activation(x, b, "gelu"), lambda: F.gelu(x + b)),
        "scaled_dot_product_attention": (
            lambda: tf.scaled_dot_product_attention(q, q, q),
            lambda: F.scaled_dot_product_attention(q, q, q),
        ),
        "varlen_attention": (lambda: tf.varlen_attention(*qkv.unbind(1), cu, None, 8, 8), None),
    }
    return [
        _overhead_case(name, ours, theirs, device)
        for name, (ours, theirs) in calls.items()
        if device == "cpu" or theirs is not None
    ]


def _overhead_case(op: str, ours: Callable, theirs: Callable | None, device: str) -> Case:
    def plain(call):
        def prepare(_):
            def run():
                with torch.no_grad():
                    return call()

            return run

        return prepare

    candidates = [
        Candidate(OURS, plain(ours)),
        # Also in no_grad: entering it is not part of a call.
        Candidate(BARE, lambda _: plain(bare_kernel(ours))(None), works_on=("cpu",)),
    ]
    if theirs is not None:
        candidates.append(Candidate(TORCH, plain(theirs)))
    return Case(
        name=f"overhead/{op}",
        title=f"one small call of {op} without gradients",
        inputs=lambda tiny: None,
        candidates=tuple(candidates),
        peer=BARE if device == "cpu" else TORCH,
        dtype="fp32",
        shape="8 rows of 768",
        bar=Bar(microseconds=10.0) if device == "cpu" else None,
        result=None,
        memory=False,
    )


def bare_kernel(call: Callable[[], object]) -> Callable[[], None]:
    """A function that runs only the native kernels of a public CPU call, with the same arguments and buffers."""
    found: list[tuple[Callable, tuple, dict]] = []

    def recorder(kernel):
        def record(*args, **kwargs):
            found.append((kernel, args, kwargs))
            return kernel(*args, **kwargs)

        return record

    prefix = "transformer_fast::cpu_"
    names = [n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith(prefix)]
    packets = [getattr(torch.ops.transformer_fast, name) for name in names]
    kernels = [packet.default for packet in packets]
    for packet, kernel in zip(packets, kernels):
        packet.default = recorder(kernel)
    try:
        with torch.no_grad():
            call()
    finally:
        for packet, kernel in zip(packets, kernels):
            packet.default = kernel
    if not found:
        raise Unavailable("this call runs no native kernel here")

    def run():
        for kernel, args, kwargs in found:
            kernel(*args, **kwargs)

    return run
