"""Attention by the kernels of torch's own scaled_dot_product_attention, with log-sum-exp and backward.

On CUDA it runs FlashAttention-2 for 16-bit calls without a mask and the memory-efficient kernel otherwise. On the CPU
it runs torch's flash kernel, so that the code around the kernels can be tested there. `_LACKS` lists the features that
they do not have.

Not yet run on a GPU.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from . import Backend, Call

_aten = torch.ops.aten
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LACKS = {
    "bias": "torch's kernels take no bias that may require a gradient",
    "bottom_right": "torch's kernels align causal masks top-left",
    "dropout": "torch's dropout masks differ from this package's",
    "relative_bias": "torch's kernels have no relative position bias",
    "softcap": "torch's kernels have no soft cap",
    "varlen": "unpadded sequences are not implemented with torch's kernels",
    "window": "torch's kernels have no window",
}
_LSE_ALIGNMENT = 32  # the memory-efficient kernel pads the rows of its log-sum-exp to a multiple of this


class _Inputs(NamedTuple):
    """The arguments of torch's kernels. They need a positive scale, so its sign (-1, 0 or 1) is folded into query."""

    query: torch.Tensor
    key: torch.Tensor  # as many heads as query
    value: torch.Tensor
    mask: torch.Tensor | None  # added to scores
    causal: bool
    scale: float
    sign: int
    dead: torch.Tensor | None  # bool, broadcasts to (B, H, Sq, 1): rows with nothing to attend to


class SdpaBackend(Backend):
    name = "sdpa"

    def why_not(self, call: Call) -> tuple[str, ...]:
        reasons = []
        if call.op != "attention":
            reasons.append(f"torch's fused kernels are for attention, not for {call.op}")
        if call.device not in ("cpu", "cuda"):
            reasons.append(f"device {call.device} is neither cuda nor cpu")
        if call.dtype not in _DTYPES:
            reasons.append(f"dtype {call.dtype} is not float32, bfloat16 or float16")
        if call.device == "cuda" and call.size % 8:
            reasons.append(f"head dim {call.size} is not a multiple of 8")
        if call.device == "cuda" and call.dtype == torch.bfloat16 and _before_ampere():
            reasons.append("the GPU is older than sm_80 and has no bfloat16")
        reasons += [_LACKS[feature] for feature in call.features if feature in _LACKS]
        return tuple(reasons)

    def attention_forward(self, spec, out, lse) -> None:
        inputs = _inputs(spec)
        o, l = _kernels(inputs).forward(inputs)[:2]
        l = l[:, :, : lse.shape[2]]
        if inputs.dead is None:
            out.copy_(o)
            lse.copy_(l)
        else:
            out.copy_(o.masked_fill(inputs.dead, 0.0))
            lse.copy_(l.masked_fill(inputs.dead.squeeze(-1), -math.inf))

    def attention_backward(self, spec, grad_out, grad_lse, out, lse, dq, dk, dv, dbias, dtable) -> None:
        inputs = _inputs(spec)
        kernels = _kernels(inputs)
        # A row with nothing to attend to has P = exp(score - inf) = 0.
        lse = lse.masked_fill(lse == -math.inf, math.inf)
        q, k, v = kernels.backward(inputs, grad_out, out, lse)
        if grad_lse is not None:
            # dS has the term P * dlse. It adds dlse * P K to dQ and P^T (dlse * Q) to dK: attention with K as value.
            upstream = grad_lse.masked_fill(lse == math.inf, 0.0).unsqueeze(-1)
            keys = inputs._replace(value=inputs.key)
            summed = kernels.forward(keys)[0]
            weighted = (upstream * inputs.query).to(q.dtype)
            q = q + upstream * summed.float() * inputs.scale
            k = k + kernels.backward(keys, weighted, summed, lse)[2].float() * inputs.scale
        dq.copy_(q * inputs.sign)
        for gradient, target in ((k, dk), (v, dv)):
            b, h, s, d = target.shape
            groups = gradient.shape[1] // h
            target.copy_(gradient.view(b, h, groups, s, d).sum(2, dtype=torch.float32) if groups > 1 else gradient)


def _before_ampere() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0)


def _inputs(spec) -> _Inputs:
    query, key, value = spec.query, spec.key, spec.value
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    sign = 1 if spec.scale > 0 else -1 if spec.scale < 0 else 0
    if sign != 1:
        query = query * sign
    causal = spec.window_right == 0
    alive = spec.mask
    if spec.key_lengths is not None:
        positions = torch.arange(key.shape[2], device=key.device)
        inside = positions < spec.key_lengths.to(key.device).view(-1, 1, 1, 1)
        alive = inside if alive is None else alive & inside
    if causal and not query.is_cuda and query.shape[2] > key.shape[2]:
        # torch's CPU kernel applies a wrong causal mask if there are more queries than keys.
        seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()[None, None]
        alive = seen if alive is None else alive & seen
        causal = False
    mask = dead = None
    if alive is not None:
        alive = alive.expand(*alive.shape[:3], key.shape[2])
        # A finite value, so that no row consists of -inf only.
        least = torch.finfo(query.dtype).min / 2
        mask = torch.zeros(alive.shape, dtype=query.dtype, device=query.device).masked_fill_(~alive, least)
        dead = _dead_rows(alive, causal, query.shape[2])
    return _Inputs(query, key, value, mask, causal, abs(spec.scale) or 1.0, sign, dead)


def _dead_rows(alive: torch.Tensor, causal: bool, queries: int) -> torch.Tensor:
    if not causal:
        return ~alive.any(-1, keepdim=True)
    # Row i attends to keys up to i, so it is dead if i is before the first key that its mask allows.
    keys = alive.shape[-1]
    first = torch.where(alive.any(-1), alive.to(torch.uint8).argmax(-1), keys).unsqueeze(-1)
    return torch.arange(queries, device=alive.device).view(1, 1, -1, 1) < first


class _Kernels(NamedTuple):
    """forward(inputs): out, lse with at least Sq columns. backward(inputs, grad_out, out, lse): gradients of q, k,
    v."""

    forward: Callable
    backward: Callable


def _kernels(inputs: _Inputs) -> _Kernels:
    q, k = inputs.query, inputs.key
    if not q.is_cuda:
        return _Kernels(_cpu_forward, _cpu_backward)
    square = not inputs.causal or q.shape[2] == k.shape[2]  # flash aligns causal masks bottom-right
    if inputs.mask is None and square and q.dtype != torch.float32 and not _before_ampere():
        return _Kernels(_flash_forward, _flash_backward)
    return _Kernels(_efficient_forward, _efficient_backward)


def _cpu_forward(x: _Inputs):
    return _aten._scaled_dot_product_flash_attention_for_cpu(
        x.query, x.key, x.value, 0.0, x.causal, attn_mask=x.mask, scale=x.scale
    )


def _cpu_backward(x: _Inputs, grad_out, out, lse):
    return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, x.query, x.key, x.value, out, lse, 0.0, x.causal, attn_mask=x.mask, scale=x.scale
    )


def _flash_forward(x: _Inputs):
    return _aten._scaled_dot_product_flash_attention(x.query, x.key, x.value, 0.0, x.causal, False, scale=x.scale)


def _flash_backward(x: _Inputs, grad_out, out, lse):
    state = torch.empty(2, dtype=torch.uint64, device=out.device)  # of dropout; not read without it
    return _aten._scaled_dot_product_flash_attention_backward(
        grad_out, x.query, x.key, x.value, out, lse.contiguous(), None, None, x.query.shape[2], x.key.shape[2], 0.0,
        x.causal, state, state[:0], scale=x.scale,
    )  # fmt: skip


def _aligned(x: _Inputs) -> torch.Tensor | None:
    """The mask as the memory-efficient kernel needs it: expanded, with row strides that are multiples of 16
    elements."""
    if x.mask is None:
        return None
    b, h, s, _ = x.query.shape
    keys = x.key.shape[2]
    padded = torch.nn.functional.pad(x.mask, (0, -keys % 16))
    return padded.expand(b, h, s, padded.shape[-1])[..., :keys]


def _efficient_forward(x: _Inputs):
    return _aten._scaled_dot_product_efficient_attention(
        x.query, x.key, x.value, _aligned(x), True, 0.0, x.causal, scale=x.scale
    )


def _efficient_backward(x: _Inputs, grad_out, out, lse):
    lse = torch.nn.functional.pad(lse, (0, -lse.shape[2] % _LSE_ALIGNMENT), value=math.inf)
    nothing = torch.zeros((), dtype=torch.int64)  # seed and offset of dropout, which is off
    return _aten._scaled_dot_product_efficient_attention_backward(
        grad_out, x.query, x.key, x.value, _aligned(x), out, lse, nothing, nothing, 0.0, [True, True, True, False],
        x.causal, scale=x.scale,
    )[:3]  # fmt: skip


BACKEND = SdpaBackend()
