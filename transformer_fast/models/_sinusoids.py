"""Sinusoidal positions (Vaswani et al., 2017)."""

import math

import torch
from torch import nn

__all__ = ["SinusoidalPositions", "sinusoids"]


def sinusoids(positions: torch.Tensor, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """PE(p, 2i) = sin(p / 10000^(2i / width)), PE(p, 2i + 1) = cos of the same: (*positions.shape, width).

    Source: Vaswani et al., 2017, section 3.5.
    """
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width
    angles = positions.to(torch.float64)[..., None] * torch.exp(exponents * -math.log(10000.0))
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(-2).to(dtype)


class SinusoidalPositions(nn.Module):
    """The first rows of `sinusoids`: no parameter, and in no checkpoint."""

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
