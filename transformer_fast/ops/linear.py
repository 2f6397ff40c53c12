"""y = activation(x W^T + b): torch's GEMMs, chosen for the machine, and packed weights for few rows."""

import torch
import torch.nn.functional as F

from . import _common
from .activation import ACTIVATIONS, bias_activation


def linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str | None = None
) -> torch.Tensor:
    """y = activation(x W^T + b). input (..., in), weight (out, in) or a pack_weight result, bias (out,).

    activation: None or one of bias_activation's names, fused with the bias. Gradients to every tensor.
    """
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation: {activation!r} is unknown; there are None, {', '.join(ACTIVATIONS)}")
    if activation is None:
        return F.linear(input, weight, bias)
    return bias_activation(F.linear(input, weight), bias, activation)


def pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """A weight laid out for few rows."""
    _common.check_floating("weight", weight)
    return weight


def packed_linear(
    input: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor] | None = None
) -> torch.Tensor:
    """x [W1; W2; ...]^T + [b1; b2; ...]: several projections of one input as one GEMM.

    When the weights lie one after the other in memory they are used as they lie, else they are joined first.
    """
    return F.linear(input, torch.cat(list(weights)), None if biases is None else torch.cat(list(biases)))
