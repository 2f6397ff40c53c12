"""How the launchers of this folder launch kernels and allocate tensors: at once, unless the caller passes a plan
(backends/triton_launch.py), which records both for the next call of the same kind."""

import torch


class Direct:
    def call(self, kernel, grid: tuple[int, ...], *arguments, **options) -> None:
        kernel[grid](*arguments, **options)

    def empty(self, shape, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)


DIRECT = Direct()
