"""Attention on the CPU without gradients, by the shortest way to the kernel.

A small call is over in a few microseconds, less than its checks take. So what was checked is remembered by its
signature, everything about a call that checks look at but for values (of cu_seqlens), and a call with a signature that
is known goes straight to the kernel.
"""

import operator

import torch

from .. import backends
from ..backends import memory
from . import _common

__all__ = ["unpadded", "padded", "remember", "signature"]

_known: dict[tuple, float] = {}  # signature -> the scale in use
_MOST = 4096


def signature(query, key, value, other, *options) -> tuple | None:
    """None when the call cannot go this way, whatever its checks say. other: a mask, cu_seqlens or None."""
    if not isinstance(query, torch.Tensor) or not query.is_cpu or not _common.direct(query, key, value, other):
        return None
    for t in (query, key, value, other):
        if t is not None and (t.layout is not torch.strided or t.is_nested):
            return None
    if torch.is_autocast_enabled("cpu"):
        return None
    about = None if other is None else (other.shape, other.dtype, other.device)
    return (
        query.shape, query.dtype, key.shape, key.dtype, key.device, value.shape, value.dtype, value.device, about,
        options, backends.forced_name(),
    )  # fmt: skip


def remember(signature: tuple | None, chosen: str, scale: float) -> None:
    """This call passed its checks and goes to the backend `chosen`."""
    if signature is None or chosen != "cpu":
        return
    if len(_known) >= _MOST:
        _known.clear()
    _known[signature] = scale


def padded(signature, query, key, value, mask, is_causal, bottom_right, return_lse):
    """The result of a call that is known, else None."""
    scale = _known.get(signature)
    if scale is None or query.stride(-1) != 1 or key.stride(-1) != 1 or value.stride(-1) != 1:
        return None
    b, h, s, d = query.shape
    out = memory.empty_strided((b, h, s, d), (s * h * d, d, h * d, 1), query.dtype)
    lse = memory.empty((b, h, s), torch.float32, query.device) if return_lse else None
    _kernel(
        query, key, value, None, mask, None, None, None, s, key.shape[2], None, None, scale, int(bottom_right), -1,
        0 if is_causal else -1, 0.0, 0.0, out, lse,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def unpadded(signature, query, key, value, cu_seqlens, longest, is_causal, return_lse):
    """The same for unpadded sequences, alike in queries and keys. longest: at least the longest, or None."""
    scale = _known.get(signature)
    if scale is None or query.stride(-1) != 1 or key.stride(-1) != 1 or value.stride(-1) != 1:
        return None
    total, h, d = query.shape
    bounds = cu_seqlens.tolist()
    steps = list(map(operator.sub, bounds[1:], bounds))
    most = max(steps)
    if bounds[0] or bounds[-1] != total or min(steps) < 0 or (longest is not None and longest < most):
        return None  # the checks say what is wrong
    out = memory.empty_strided((total, h, d), (h * d, d, 1), query.dtype)
    lse = memory.empty((h, total), torch.float32, query.device) if return_lse else None
    _kernel(
        query, key, value, None, None, None, cu_seqlens, cu_seqlens, most, most, None, None, scale, 0, -1,
        0 if is_causal else -1, 0.0, 0.0, out, lse,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _kernel(*args) -> None:
    torch.ops.transformer_fast.cpu_attention_forward.default(*args)
