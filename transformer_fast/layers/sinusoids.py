"""Sinusoidal positions (Vaswani et al., 2017)."""

import math

import torch
from torch import nn

__all__ = ["SinusoidalPositions", "sinusoids"]


def sinusoids(positions: torch.Tensor, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """PE(p, 2i) = sin(p / 10000^(2i / width)), PE(p, 2i + 1) = cos of the same angle.

    Args:
        positions: a tensor of any shape and dtype.
        width: the embedding size, an even number.
        dtype: dtype of the result; angles are computed in float64.

    Returns:
        (*positions.shape, width) in `dtype`.

    Raises:
        ValueError: for an odd width.

    Source:
        Vaswani et al., "Attention Is All You Need", 2017, section 3.5.

    Examples:
        >>> import torch, transformer_fast
        >>> transformer_fast.sinusoids(torch.arange(50), 128).shape
        torch.Size([50, 128])
    """
    if width < 2 or width % 2:
        raise ValueError(f"width: wanted an even number, at least 2, got {width}")
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width
    angles = positions.to(torch.float64)[..., None] * torch.exp(exponents * -math.log(10000.0))
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(-2).to(dtype)


class SinusoidalPositions(nn.Module):
    """A table of the first `count` rows of `sinusoids`, as a buffer that is not saved in checkpoints."""

    weight: torch.Tensor

    def __init__(self, count: int, width: int):
        super().__init__()
        self.register_buffer("weight", torch.empty(count, width), persistent=False)
        self.weight.copy_(self.table())

    def table(self) -> torch.Tensor:
        count, width = self.weight.shape
        return sinusoids(torch.arange(count, device=self.weight.device), width, self.weight.dtype)

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        return self.weight[positions]
