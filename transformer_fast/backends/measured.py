"""Calls for which a backend other than the first in ORDER was measured faster. Data only, read once per kind of call.

A line is added only with the results folder that shows it. What no line covers was not measured, or was not faster.
"""

from typing import NamedTuple

import torch

from . import Call


class Line(NamedTuple):
    """Prefer `backend` for the calls that match. Empty tuples and None match any value.

    lengths: (least, most) of Call.length. features: all features of the call must be among these; "backward" is
    ignored, as a line holds for both passes. capability: the compute capability of the GPU. measured: the folder under
    benchmarks/results that shows it.
    """

    backend: str
    measured: str
    op: str
    device: str
    dtypes: tuple[torch.dtype, ...] = ()
    sizes: tuple[int, ...] = ()
    lengths: tuple[int, int] | None = None
    features: tuple[str, ...] | None = None
    capability: tuple[int, int] | None = None

    def holds(self, call: Call) -> bool:
        return (
            (self.op, self.device) == (call.op, call.device)
            and (not self.dtypes or call.dtype in self.dtypes)
            and (not self.sizes or call.size in self.sizes)
            and (self.lengths is None or self.lengths[0] <= call.length <= self.lengths[1])
            and (self.features is None or set(call.features) - {"backward"} <= set(self.features))
            and (self.capability is None or self.capability == _capability())
        )


def _capability() -> tuple[int, int] | None:
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


_H200 = "cuda-nvidia-h200/2026-11-29-b91e5bdb3d"
_HALF = (torch.bfloat16, torch.float16)  # one kernel; timed in bfloat16
_ENDLESS = 1 << 62

LINES: tuple[Line, ...] = (
    # Forward 1.15 to 2.02 times as fast as Triton, backward 2.20 to 3.64 times, at 4096 and 16384 tokens.
    Line("cuda", _H200, "attention", "cuda", _HALF, (64, 128), (4096, _ENDLESS), ("causal",), (9, 0)),
)


def line(call: Call) -> Line | None:
    """The first line that matches the call; None if there is none."""
    return next((line for line in LINES if line.holds(call)), None)
