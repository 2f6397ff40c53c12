"""Where another backend than the first in ORDER was measured to be faster: data, looked up once per kind of call.

A line is added only with the results folder that shows it. Not yet run on a GPU: there is none.
"""

from typing import NamedTuple

import torch

from . import Call


class Line(NamedTuple):
    """`backend` first for calls like these. Empty tuples and None stand for any.

    lengths: (least, most) of the longer of queries and keys. features: the call's must be among them, but for
    "backward": a line holds for both passes.
    measured: the folder under benchmarks/results that shows it.
    """

    backend: str
    measured: str
    op: str
    device: str
    dtypes: tuple[torch.dtype, ...] = ()
    sizes: tuple[int, ...] = ()
    lengths: tuple[int, int] | None = None
    features: tuple[str, ...] | None = None

    def holds(self, call: Call) -> bool:
        return (
            (self.op, self.device) == (call.op, call.device)
            and (not self.dtypes or call.dtype in self.dtypes)
            and (not self.sizes or call.size in self.sizes)
            and (self.lengths is None or self.lengths[0] <= call.length <= self.lengths[1])
            and (self.features is None or set(call.features) - {"backward"} <= set(self.features))
        )


LINES: tuple[Line, ...] = ()


def line(call: Call) -> Line | None:
    """The first line that holds for a call."""
    return next((line for line in LINES if line.holds(call)), None)
