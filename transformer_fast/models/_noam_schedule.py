"""The learning rate of the 2017 Transformer."""

import torch
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["noam_schedule"]


def noam_schedule(optimizer: torch.optim.Optimizer, d_model: int, warmup: int = 4000) -> LambdaLR:
    """lr = optimizer's lr * d_model^-0.5 * min(step^-0.5, step * warmup^-1.5), step = 1, 2, ...

    This is the paper's schedule if the optimizer has lr 1 (Adam, betas (0.9, 0.98), eps 1e-9): linear for `warmup`
    steps, then with the inverse square root. Call step() after each optimizer step.

    Args:
        optimizer: any of torch's.
        d_model: the model's width.
        warmup: number of steps with a rising rate.

    Returns:
        A torch.optim.lr_scheduler.LambdaLR.

    Raises:
        ValueError: for a d_model or warmup under 1.

    Source:
        Vaswani et al., "Attention Is All You Need", 2017, section 5.3.

    Examples:
        >>> import torch, transformer_fast
        >>> optimizer = torch.optim.Adam(torch.nn.Linear(2, 2).parameters(), lr=1.0, betas=(0.9, 0.98), eps=1e-9)
        >>> schedule = transformer_fast.noam_schedule(optimizer, d_model=512)
    """
    if d_model < 1 or warmup < 1:
        raise ValueError(f"d_model, warmup: wanted numbers from 1 on, got {d_model} and {warmup}")
    return LambdaLR(optimizer, lambda step: d_model**-0.5 * min((step + 1) ** -0.5, (step + 1) * warmup**-1.5))
