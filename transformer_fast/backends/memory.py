"""Output memory of the ops: one place to allocate, so that tests can poison it."""

import os

import torch

_poison = os.environ.get("TRANSFORMER_FAST_POISON") == "1"


def empty_like(t: torch.Tensor) -> torch.Tensor:
    """Uninitialised contiguous output of t's shape, dtype and device; poisoned as in empty."""
    if _poison or not t.is_contiguous():
        return empty(t.shape, t.dtype, t.device)
    return torch.empty_like(t)


def empty(shape, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uninitialised output; filled with NaN when TRANSFORMER_FAST_POISON=1 (tests)."""
    out = torch.empty(shape, dtype=dtype, device=device)
    if _poison and out.is_floating_point():
        out.fill_(float("nan"))
    return out
