"""The learning rate of the 2017 Transformer."""

import torch
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["noam_schedule"]


def noam_schedule(optimizer: torch.optim.Optimizer, d_model: int, warmup: int = 4000) -> LambdaLR:
    """lr = optimizer's lr * d_model^-0.5 * min(step^-0.5, step * warmup^-1.5), step = 1, 2, ...

    The paper's with an optimizer of lr 1 (Adam, betas (0.9, 0.98), eps 1e-9): linear for `warmup` steps, then with the
    inverse square root. Call step() after each optimizer step. Source: Vaswani et al., 2017, section 5.3.
    """
    if d_model < 1 or warmup < 1:
        raise ValueError(f"d_model, warmup: wanted numbers from 1 on, got {d_model} and {warmup}")
    return LambdaLR(optimizer, lambda step: d_model**-0.5 * min((step + 1) ** -0.5, (step + 1) * warmup**-1.5))
