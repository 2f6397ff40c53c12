"""The machine's peak rates, measured in the same run as the cases: matrix products, memory copies and reads."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .case import Part
from .timing import Budget, interleave

__all__ = ["Ceilings", "measure"]


class Ceilings(NamedTuple):
    """gemm: {dtype name: FLOP/s of a square matrix product}. copy: bytes read and written per second. read: bytes read
    per second from memory; 0 if not measured."""

    gemm: dict[str, float]
    copy: float
    read: float = 0.0

    def seconds(self, flops: float, bytes_: float, dtype: str, parts: Sequence[Part] = ()) -> float:
        """The least time of a piece of work at these rates, if arithmetic and memory traffic overlap and parts do not.

        dtype: of the arithmetic; what follows a comma is ignored.
        """
        rate, read = self.gemm.get(dtype.split(",")[0]) or self.gemm["fp32"], max(self.read, self.copy)
        whole = max(flops / rate, bytes_ / self.copy)
        return whole + sum(max(part.flops / rate, part.read / read) for part in parts)


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
    if device == "cpu":
        gemms["int8"] = torch.int8
        left, right = (torch.randint(-127, 127, (size, size), dtype=torch.int8) for _ in range(2))
        calls["int8 mm"] = lambda: torch._int_mm(left, right)
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    calls["copy"] = lambda: target.copy_(source)
    calls["read sum"] = lambda: source.sum()
    calls["read rows"] = lambda: source.view(1 << 9, -1).amax(1)
    with torch.no_grad():
        times = {name: timing.median for name, timing in interleave(calls, device=device, budget=budget).items()}
    work = 2.0 * size**3
    rates = {name: max(work / t for key, t in times.items() if key.startswith(name)) for name in gemms}
    read = min(t for key, t in times.items() if key.startswith("read"))
    return Ceilings(rates | {"fp16": rates["bf16"]}, 2.0 * source.nbytes / times["copy"], source.nbytes / read)
