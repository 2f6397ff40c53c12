"""The machine's peak rates, measured in the same run as the cases: matrix multiplication and memory copy."""

from typing import NamedTuple

import torch

from .timing import Budget, interleave

__all__ = ["Ceilings", "measure"]


class Ceilings(NamedTuple):
    """gemm: {dtype name: FLOP/s of a square matrix product}. copy: bytes read and written per second."""

    gemm: dict[str, float]
    copy: float

    def seconds(self, flops: float, bytes_: float, dtype: str) -> float:
        """The least time of a piece of work at these rates, if arithmetic and memory traffic overlap."""
        rate = self.gemm.get(dtype) or self.gemm["fp32"]
        return max(flops / rate, bytes_ / self.copy)


def measure(device: str, budget: Budget) -> Ceilings:
    """The best median over torch's implementations: on the CPU its two GEMM libraries."""
    size, elements = (8192, 1 << 28) if device == "cuda" else (1024, 1 << 24)
    calls, gemms = {}, {"fp32": torch.float32, "bf16": torch.bfloat16}
    for name, dtype in gemms.items():
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        calls[f"{name} mm"] = lambda a=a, b=b, out=out: torch.mm(a, b, out=out)
        if device == "cpu" and torch.backends.mkldnn.is_available():
            calls[f"{name} linear"] = lambda a=a, b=b: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    calls["copy"] = lambda: target.copy_(source)
    with torch.no_grad():
        times = {name: timing.median for name, timing in interleave(calls, device=device, budget=budget).items()}
    work = 2.0 * size**3
    rates = {name: max(work / t for key, t in times.items() if key.startswith(name)) for name in gemms}
    return Ceilings(rates | {"fp16": rates["bf16"]}, 2.0 * source.nbytes / times["copy"])
