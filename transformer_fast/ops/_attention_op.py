"""The registered attention ops: schemas, fake kernels, autograd, and the calls of the backend.

The public functions are in ops/attention.py, their input checks in _attention_arguments.py. Users call nothing here.
"""

from typing import NamedTuple

import torch

from ..backends import Backend, Call, eager, memory, select
from ..backends.contract import Repeat
from ..backends.specs import AttentionSpec, SymInt
from . import _common

CAUSAL = {"top_left": 0, "bottom_right": 1}
_SPEC = _common.schema_of(AttentionSpec)


def features(spec: AttentionSpec) -> tuple[str, ...]:
    """The features that a call uses beyond plain attention, sorted by name."""
    found = []
    if spec.bias is not None:
        found.append("bias")
    if spec.bottom_right and _placed(spec):
        found.append("bottom_right")
    if spec.window_right == 0 and spec.window_left < 0:
        found.append("causal")
    if spec.dropout_p:
        found.append("dropout")
    if spec.key.shape[1] != spec.query.shape[1]:
        found.append("gqa")
    if spec.key_lengths is not None:
        found.append("key_lengths")
    if spec.mask is not None:
        found.append("mask")
    if spec.relative_bias is not None:
        found.append("relative_bias")
    if spec.softcap:
        found.append("softcap")
    if spec.cu_seqlens_q is not None:
        found.append("varlen")
    if spec.window_left >= 0 or spec.window_right > 0:
        found.append("window")
    return tuple(found)


def _placed(spec: AttentionSpec) -> bool:
    """Whether the alignment changes the result."""
    placed = spec.window_left >= 0 or spec.window_right >= 0 or spec.relative_bias is not None
    same = spec.cu_seqlens_q is spec.cu_seqlens_k and spec.key_lengths is None
    return placed and not (same and spec.max_seqlen_q == spec.max_seqlen_k)


def choose(spec: AttentionSpec, backward: bool = False) -> Backend:
    """The backend of a call. backward: select for the gradients, which may be another backend than the output's."""
    q = spec.query
    asked = ("backward", *features(spec)) if backward else features(spec)
    length = 1 << (max(spec.max_seqlen_q, spec.max_seqlen_k) - 1).bit_length() if q.is_cuda else 0
    return select(Call("attention", q.device.type, q.dtype, q.shape[-1], asked, length))


def _out_like(q: torch.Tensor) -> torch.Tensor:
    """An output with the memory layout (B, S, H, D), whatever query's strides, so that heads merge without a copy."""
    if q.dim() == 3:
        return memory.empty(q.shape, q.dtype, q.device)
    b, h, s, d = q.shape
    return memory.empty((b, s, h, d), q.dtype, q.device).transpose(1, 2)


def _lse_shape(q: torch.Tensor) -> tuple:
    return (q.shape[1], q.shape[0]) if q.dim() == 3 else tuple(q.shape[:3])


def _lse_dtype(q: torch.Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def forward_impl(*args) -> tuple[torch.Tensor, torch.Tensor]:
    return _run_forward(AttentionSpec(*args))


def _run_forward(spec: AttentionSpec) -> tuple[torch.Tensor, torch.Tensor]:
    return launch(spec)[0]


def launch(spec: AttentionSpec) -> tuple[tuple[torch.Tensor, torch.Tensor], Repeat | None]:
    """out and lse, and a function that makes the call again."""
    given = spec
    q = spec.query
    spec = _unit_stride(spec)
    out = _out_like(q)
    lse = memory.empty(_lse_shape(q), _lse_dtype(q), q.device)
    if out.numel() == 0 or spec.key.numel() == 0:
        return (out.zero_(), lse.fill_(float("-inf"))), None
    repeat = choose(spec).attention_forward(spec, out, lse)
    return (out, lse), repeat if spec is given else None


def launch_backward(spec: AttentionSpec, grad_out, out, lse) -> tuple[list[torch.Tensor], Repeat | None]:
    """The gradients of query, key and value of a call without other tensors, and a function that makes the call again.
    No tensor is empty."""
    given = spec
    spec = _unit_stride(spec)
    grads = [_out_like(t) for t in spec[:3]]
    dq, dk, dv = grads
    repeat = choose(spec, backward=True).attention_backward(spec, grad_out, None, out, lse, dq, dk, dv, None, None)
    return grads, repeat if spec is given else None


def _unit_stride(spec: AttentionSpec) -> AttentionSpec:
    q, k, v = map(memory.unit_stride, spec[:3])
    return spec if q is spec[0] and k is spec[1] and v is spec[2] else spec._replace(query=q, key=k, value=v)


def _forward_fake(*args):
    q = args[0]
    if q.dim() == 3:
        out = q.new_empty(q.shape)
    else:
        b, h, s, d = q.shape
        out = q.new_empty((b, s, h, d)).transpose(1, 2)
    return out, q.new_empty(_lse_shape(q), dtype=_lse_dtype(q))


def backward_impl(grad_out, grad_lse, out, lse, *rest):
    """Gradients of query, key, value, bias and the relative bias table; the last two are empty if not needed."""
    *args, need_bias, need_relative = rest
    spec = _unit_stride(AttentionSpec(*args))
    grads = [_out_like(t) for t in spec[:3]]
    by_hand = need_bias and _is_one_per_row(spec, grad_lse)
    bias, table = _extra_gradients(spec, need_bias and not by_hand, need_relative)
    _run_backward(spec, grad_out, grad_lse, out, lse, *grads, bias, table)
    if by_hand:
        bias = _gradient_of_rows(spec, grad_lse, lse)
    return (*grads, *_narrow(spec, (bias, table)))


def _is_one_per_row(spec: AttentionSpec, grad_lse: torch.Tensor | None) -> bool:
    """Whether the bias is constant along each row of scores. If lse has a gradient, it must also be padded, as its
    shape then matches the bias."""
    if spec.bias is None or spec.bias.shape[-1] != 1 or (grad_lse is not None and spec.cu_seqlens_q is not None):
        return False
    return choose(spec, backward=True).name != "eager"  # eager keeps autograd's own result


def _gradient_of_rows(spec: AttentionSpec, grad_lse: torch.Tensor | None, lse: torch.Tensor) -> torch.Tensor:
    """The gradient of a bias that is constant along rows. Such a bias does not change the softmax and shifts lse, so
    its gradient is that of lse. A kernel's sum of score gradients would be zero plus rounding errors."""
    assert spec.bias is not None
    if grad_lse is None:
        return torch.zeros(spec.bias.shape, dtype=_lse_dtype(spec.query), device=spec.query.device)
    rows = grad_lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1).to(torch.float64)
    return rows.sum_to_size(spec.bias.shape).to(_lse_dtype(spec.query))


def _extra_gradients(spec, need_bias, need_relative):
    wide, device = _lse_dtype(spec.query), spec.query.device
    bias = torch.zeros(spec.bias.shape if need_bias else (0,), dtype=wide, device=device)
    table = torch.zeros(spec.relative_bias.shape if need_relative else (0,), dtype=wide, device=device)
    return bias, table


def _narrow(spec, extras):
    bias, table = extras
    return (
        bias.to(spec.bias.dtype) if spec.bias is not None else bias,
        table.to(spec.relative_bias.dtype) if spec.relative_bias is not None else table,
    )


def _run_backward(spec, grad_out, grad_lse, out, lse, dq, dk, dv, dbias, dtable) -> None:
    if out.numel() == 0 or spec.key.numel() == 0:
        for g in (dq, dk, dv):
            g.zero_()
        return
    grad_out = memory.unit_stride(grad_out)
    choose(spec, backward=True).attention_backward(
        spec, grad_out, grad_lse, out, lse, dq, dk, dv,
        dbias if dbias.numel() else None, dtable if dtable.numel() else None,
    )  # fmt: skip


def _backward_fake(grad_out, grad_lse, out, lse, *rest):
    *args, need_bias, need_relative = rest
    spec = AttentionSpec(*args)

    def like(t):
        return t.new_empty(t.shape) if t.dim() == 3 else t.new_empty(t.transpose(1, 2).shape).transpose(1, 2)

    wide = _lse_dtype(spec.query)
    bias, table = spec.bias, spec.relative_bias
    return (
        *(like(t) for t in spec[:3]),
        spec.query.new_empty(bias.shape if need_bias else (0,), dtype=wide if bias is None else bias.dtype),
        spec.query.new_empty(table.shape if need_relative else (0,), dtype=wide if table is None else table.dtype),
    )


_backward_op = _common.define(
    "attention_backward",
    f"(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, {_SPEC}, bool need_bias, bool need_relative) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    backward_impl,
    _backward_fake,
)


def plain(spec: AttentionSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse in plain PyTorch, for higher-order gradients and torch.func transforms."""
    out, lse = eager.attention(spec)
    return out, lse.to(_lse_dtype(spec.query))


def _setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    _common.save(ctx, AttentionSpec(*inputs), *output)


def backward(ctx, need, grad_out, grad_lse):
    spec, out, lse = _common.saved(ctx)
    if grad_out is None and grad_lse is None:
        return {}
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    names = ("query", "key", "value", "bias", "relative_bias")
    if torch.is_grad_enabled() and out.numel() and spec.key.numel():
        if grad_lse is not None:
            grad_lse = grad_lse.masked_fill(lse == float("-inf"), 0.0)
        return _common.gradients_of(plain, spec, names, (grad_out, grad_lse))
    needs = bool(need.bias), bool(need.relative_bias)
    return dict(zip(names, _backward_op(grad_out, grad_lse, out, lse, *spec, *needs)))


attention_op = _common.define(
    "attention", f"({_SPEC}) -> (Tensor, Tensor)", forward_impl, _forward_fake, setup_context=_setup, backward=backward
)


# ---- fused projections: one gradient for query, key and value ---------------------------------------
class QkvSpec(NamedTuple):
    """Self-attention on fused projections: qkv (B, S, 3, H, D), or (total, 3, H, D) with cu_seqlens."""

    qkv: torch.Tensor
    key_lengths: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    max_seqlen: SymInt
    rng: torch.Tensor | None
    scale: float
    causal: int
    dropout_p: float


_QKV = _common.schema_of(QkvSpec)


def qkv_views(qkv: torch.Tensor, unpadded: bool) -> tuple[torch.Tensor, ...]:
    parts = qkv.unbind(-3)
    return parts if unpadded else tuple(t.transpose(1, 2) for t in parts)


def parts_of(given: QkvSpec) -> AttentionSpec:
    cu, longest = given.cu_seqlens, given.max_seqlen
    q, k, v = qkv_views(given.qkv, cu is not None)
    return AttentionSpec(
        query=q, key=k, value=v, bias=None, mask=None, key_lengths=given.key_lengths, cu_seqlens_q=cu, cu_seqlens_k=cu,
        max_seqlen_q=longest, max_seqlen_k=longest, relative_bias=None, relative_max_distance=0,
        relative_bidirectional=False, rng=given.rng, scale=given.scale, bottom_right=0, window_left=-1,
        window_right=0 if given.causal else -1, softcap=0.0, dropout_p=given.dropout_p,
    )  # fmt: skip


def qkv_forward_impl(*args):
    spec = parts_of(QkvSpec(*args))
    out, lse = _run_forward(spec)
    return (out if spec.cu_seqlens_q is not None else out.transpose(1, 2)), lse


def qkv_plain(given: QkvSpec) -> tuple[torch.Tensor, torch.Tensor]:
    spec = parts_of(given)
    out, lse = plain(spec)
    return (out if spec.cu_seqlens_q is not None else out.transpose(1, 2)), lse


def _qkv_forward_fake(*args):
    given = QkvSpec(*args)
    *rows, _, h, d = given.qkv.shape
    lse = (h, *rows) if given.cu_seqlens is not None else (rows[0], h, rows[1])
    return given.qkv.new_empty((*rows, h, d)), given.qkv.new_empty(lse, dtype=_lse_dtype(given.qkv))


def qkv_backward_impl(grad_out, out, lse, *args):
    given = QkvSpec(*args)
    spec, unpadded = _unit_stride(parts_of(given)), given.cu_seqlens is not None
    grad = memory.empty(given.qkv.shape, given.qkv.dtype, given.qkv.device)
    if not unpadded:
        grad_out, out = grad_out.transpose(1, 2), out.transpose(1, 2)
    nothing = given.qkv.new_empty(0)
    _run_backward(spec, grad_out, None, out, lse, *qkv_views(grad, unpadded), nothing, nothing)
    return grad


def _qkv_backward_fake(grad_out, out, lse, *args):
    return args[0].new_empty(args[0].shape)


_qkv_backward_op = _common.define(
    "qkv_attention_backward",
    f"(Tensor grad_out, Tensor out, Tensor lse, {_QKV}) -> Tensor",
    qkv_backward_impl,
    _qkv_backward_fake,
)


def _qkv_setup(ctx, inputs, output):
    _common.save(ctx, QkvSpec(*inputs), *output)
    ctx.mark_non_differentiable(output[1])


def qkv_backward(ctx, need, grad_out, _grad_lse):
    given, out, lse = _common.saved(ctx)
    if torch.is_grad_enabled() and given.qkv.numel():
        return _common.gradients_of(qkv_plain, given, ("qkv",), (grad_out,))
    return {"qkv": _qkv_backward_op(grad_out, out, lse, *given)}


qkv_attention_op = _common.define(
    "qkv_attention",
    f"({_QKV}) -> (Tensor, Tensor)",
    qkv_forward_impl,
    _qkv_forward_fake,
    setup_context=_qkv_setup,
    backward=qkv_backward,
)
