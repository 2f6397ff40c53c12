"""int8 matrix products in plain PyTorch: their definition, and the fallback where there is no kernel."""

import torch
import torch.nn.functional as F

from . import eager

_SMALLEST = 1e-30  # a group whose range is smaller than this is quantised to zeros


def groups(width: int, group: int) -> int:
    return -(-width // group)


def quantize_weight(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """weight (out, in) -> q int8 (out, in) and scale float32 (out, groups), with w = scale q, scale = max |w| / 127."""
    out, inner = weight.shape
    wide = F.pad(weight.detach().float(), (0, -inner % group)).view(out, groups(inner, group), group)
    largest = wide.abs().amax(-1)
    inverse = torch.where(largest > _SMALLEST, torch.full_like(largest, 127.0) / largest, 0.0)
    q = (wide * inverse[..., None]).nan_to_num(0.0).round().to(torch.int8)
    return q.flatten(1)[:, :inner].contiguous(), largest / 127


def quantize_rows(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (rows, in) float32 -> u (rows, groups, group) in 0..255, scale and zero point (rows, groups), all float32, with
    x = scale (u - zero). The range of a group includes 0. A group with a value that is not finite has scale NaN."""
    wide = F.pad(x, (0, -x.shape[1] % group)).view(x.shape[0], groups(x.shape[1], group), group)
    low, high = wide.amin(-1).clamp(max=0), wide.amax(-1).clamp(min=0)
    span = high - low
    some = span > _SMALLEST
    inverse = torch.where(some, torch.full_like(span, 255.0) / span, 0.0)
    zero = (-low * inverse).nan_to_num(0.0).round()
    u = ((wide * inverse[..., None]).nan_to_num(0.0).round() + zero[..., None]).clamp(0, 255)
    odd = (wide * 0).sum(-1)
    return u, torch.where(some, span / 255, 0.0) + odd, zero


def linear_int8(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, group: int) -> torch.Tensor:
    """x (rows, in), q (out, in), scale (out, groups) -> x W^T (rows, out) in float32. Sums within a group are exact."""
    u, x_scale, zero = quantize_rows(x.float(), group)
    weight = F.pad(q, (0, -q.shape[1] % group)).view(q.shape[0], groups(q.shape[1], group), group)
    y = x.new_zeros((x.shape[0], q.shape[0]), dtype=torch.float32)
    for g in range(scale.shape[1]):
        # Sums of integer products stay below 2^24, so float32 computes them exactly.
        exact = (u[:, g] - zero[:, g, None]) @ weight[:, g].float().t()
        y = y + exact * x_scale[:, g, None] * scale[:, g]
    return y


def finish(y: torch.Tensor, bias: torch.Tensor | None, activation: str | None, dtype: torch.dtype) -> torch.Tensor:
    """activation(y + bias) in dtype."""
    if bias is not None:
        y = y + bias.float()
    if activation is not None:
        y = eager.bias_activation(y, None, None, activation)
    return y.to(dtype)
