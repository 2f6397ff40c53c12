"""A fast path for attention on the CPU without gradients.

A small call takes a few microseconds, less than its checks. So the signature of each checked call is remembered: all
that the checks look at except the values of cu_seqlens. A call with a known signature goes straight to the kernel.
"""

import operator

import torch

from .. import backends
from ..backends import memory
from . import _common

__all__ = ["unpadded", "padded", "remember", "signature"]

_known: dict[tuple, float] = {}  # signature -> scale
_MOST = 4096


def signature(query, key, value, other, *options) -> tuple | None:
    """The signature of a call, or None if the call cannot take the fast path. other: a mask, cu_seqlens or None."""
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
    """Remember that a call with this signature passed its checks. chosen: the name of its backend."""
    if signature is None or chosen != "cpu":
        return
    if len(_known) >= _MOST:
        _known.clear()
    _known[signature] = scale


def padded(signature, query, key, value, mask, is_causal, bottom_right, return_lse):
    """The result of a padded call if its signature is known, else None."""
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
    """The result of an unpadded call with the same sequences for queries and keys if its signature is known, else None.
    longest: an upper bound of the sequences' lengths, or None."""
    scale = _known.get(signature)
    if scale is None or query.stride(-1) != 1 or key.stride(-1) != 1 or value.stride(-1) != 1:
        return None
    total, h, d = query.shape
    bounds = cu_seqlens.tolist()
    steps = list(map(operator.sub, bounds[1:], bounds))
    most = max(steps)
    if bounds[0] or bounds[-1] != total or min(steps) < 0 or (longest is not None and longest < most):
        return None  # the full checks raise the error
    out = memory.empty_strided((total, h, d), (h * d, d, 1), query.dtype)
    lse = memory.empty((h, total), torch.float32, query.device) if return_lse else None
    _kernel(
        query, key, value, None, None, None, cu_seqlens, cu_seqlens, most, most, None, None, scale, 0, -1,
        0 if is_causal else -1, 0.0, 0.0, out, lse,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _kernel(*args) -> None:
    torch.ops.transformer_fast.cpu_attention_forward.default(*args)
