"""Block sizes of the attention kernels: a table, looked up by a call's shape class and never tuned at run time.

`benchmarks/tune.py` writes measured rows. These were chosen from compiled code (registers, spills, shared memory) and
from published results of kernels of this design.
"""

from typing import NamedTuple

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
KERNELS = ("forward", "backward_key", "backward_query", "backward_table", "backward_bias", "decode")
KINDS = ("plain", "rich", "relative", "grouped")


class Config(NamedTuple):
    """Queries and keys per tile, warps per program, stages of its load pipeline. max_registers: per thread, where ptxas
    by itself would take fewer and spill. columns: of the head dim, per program, where sums of whole rows do not fit the
    registers."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None
    columns: int | None = None


class Shape(NamedTuple):
    """What a configuration depends on.

    architecture: one of ARCHITECTURES. width: head dim rounded up to 64, 128 or 256. single: float32 data.
    kind: how many registers a call needs beside its tiles. "relative": a relative bias (five loops, one per part of the
    keys). "rich": another bias, a mask, a soft cap, dropout, a window on the left, or a head dim between 128 and 256,
    whose columns are masked. "plain": all others. In "backward_key" a plain call of query heads that share a key head
    is "grouped": it has a loop over them.
    short: at most 64 queries per sequence.
    """

    architecture: str
    width: int
    single: bool = False
    kind: str = "plain"
    short: bool = False


def architecture(capability: tuple[int, int]) -> str:
    """The class of a compute capability: sm_120 stands for all with 100 KiB of shared memory."""
    major, minor = capability
    if major == 9:
        return "sm_90"
    if major in (10, 11):
        return "sm_100"
    return "sm_80" if (major, minor) in ((8, 0), (8, 7)) else "sm_120"


def shape(capability: tuple[int, int], head_dim: int, itemsize: int, kind: str, queries: int) -> Shape:
    width = 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256
    if kind == "plain" and 128 < head_dim < 256:
        kind = "rich"
    return Shape(architecture(capability), width, itemsize == 4, kind, queries <= 64)


HALF, SINGLE = False, True

# (kernel, architecture, width, single) -> one configuration per kind. Architecture "": all without a row of their own.
# Without one of their own, "relative" and "grouped" take the configuration of "rich".
# fmt: off
TABLE: dict[tuple[str, str, int, bool], tuple[Config, ...]] = {
    ("forward", "", 64, HALF): (Config(128, 64, 8, 3), Config(128, 64, 8, 2)),
    ("forward", "sm_90", 64, HALF): (Config(128, 64, 4, 3), Config(128, 64, 8, 2)),
    ("forward", "sm_100", 64, HALF): (Config(128, 64, 8, 3), Config(128, 64, 8, 2), Config(64, 64, 8, 2, 255)),
    ("forward", "sm_120", 64, HALF): (Config(128, 64, 8, 2), Config(128, 64, 8, 1)),
    ("forward", "", 128, HALF): (Config(128, 64, 8, 3), Config(128, 32, 8, 2)),
    ("forward", "sm_80", 128, HALF): (Config(128, 32, 8, 3), Config(128, 32, 8, 1), Config(64, 16, 8, 1)),
    ("forward", "sm_100", 128, HALF): (Config(128, 64, 8, 3), Config(64, 64, 8, 1, 255)),
    ("forward", "sm_120", 128, HALF): (Config(128, 64, 8, 2), Config(128, 32, 8, 1), Config(64, 32, 8, 1)),
    ("forward", "", 256, HALF): (Config(64, 64, 8, 2), Config(64, 32, 8, 2), Config(64, 32, 8, 1, columns=128)),
    ("forward", "sm_80", 256, HALF): (Config(64, 32, 8, 2), Config(64, 32, 8, 2), Config(32, 32, 8, 1, columns=128)),
    ("forward", "sm_90", 256, HALF): (Config(128, 32, 8, 2), Config(128, 32, 8, 2, columns=128), Config(64, 16, 4, 1, columns=64)),
    ("forward", "sm_100", 256, HALF): (Config(64, 64, 8, 2), Config(64, 32, 8, 2), Config(64, 32, 8, 1, 255, 128)),
    ("forward", "sm_120", 256, HALF): (Config(64, 32, 8, 1), Config(64, 16, 8, 1), Config(64, 32, 8, 1, columns=128)),
    ("backward_key", "", 64, HALF): (Config(32, 128, 8, 2),),
    ("backward_key", "sm_80", 64, HALF): (Config(32, 128, 8, 1), Config(16, 128, 8, 1)),
    ("backward_key", "sm_90", 64, HALF): (Config(32, 128, 8, 2), Config(32, 128, 8, 1)),
    ("backward_key", "sm_100", 64, HALF): (Config(32, 128, 8, 2), Config(32, 128, 8, 1), Config(32, 128, 8, 2)),
    ("backward_key", "sm_120", 64, HALF): (Config(32, 128, 8, 1), Config(16, 128, 8, 1)),
    ("backward_key", "", 128, HALF): (Config(32, 128, 8, 1), Config(16, 128, 8, 1)),
    ("backward_key", "sm_80", 128, HALF): (Config(32, 64, 8, 1), Config(32, 32, 8, 1)),
    ("backward_key", "sm_90", 128, HALF): (Config(16, 64, 4, 2), Config(16, 128, 8, 2), Config(16, 128, 8, 1, columns=64), Config(16, 64, 8, 2)),
    ("backward_key", "sm_120", 128, HALF): (Config(32, 64, 8, 1), Config(16, 64, 8, 1), Config(16, 32, 8, 1)),
    ("backward_key", "sm_80", 256, HALF): (Config(32, 64, 8, 1), Config(16, 32, 8, 1), Config(16, 32, 8, 1, columns=128)),
    ("backward_key", "sm_90", 256, HALF): (Config(16, 128, 8, 1, columns=64), Config(16, 128, 8, 1, columns=64), Config(16, 64, 4, 1, columns=32)),
    ("backward_key", "sm_100", 256, HALF): (Config(32, 64, 8, 1, 255, 128),),
    ("backward_key", "sm_120", 256, HALF): (Config(16, 64, 8, 1), Config(16, 32, 8, 1), Config(16, 32, 8, 1, columns=128)),
    ("backward_query", "", 64, HALF): (Config(128, 32, 8, 2), Config(64, 32, 8, 2)),
    ("backward_query", "sm_80", 64, HALF): (Config(128, 32, 8, 2), Config(64, 32, 8, 1)),
    ("backward_query", "sm_100", 64, HALF): (Config(128, 32, 8, 2), Config(64, 32, 8, 2), Config(64, 32, 8, 2, 255)),
    ("backward_query", "sm_120", 64, HALF): (Config(128, 32, 8, 2), Config(64, 32, 8, 1), Config(64, 32, 8, 1, 255)),
    ("backward_query", "", 128, HALF): (Config(128, 32, 8, 2), Config(64, 32, 8, 1)),
    ("backward_query", "sm_80", 128, HALF): (Config(128, 32, 8, 2), Config(64, 32, 8, 1), Config(64, 16, 8, 1)),
    ("backward_query", "sm_90", 128, HALF): (Config(128, 32, 8, 2), Config(64, 32, 4, 1), Config(64, 16, 8, 1)),
    ("backward_query", "sm_100", 128, HALF): (Config(128, 32, 8, 2, 255), Config(64, 32, 8, 1, 255)),
    ("backward_query", "sm_120", 128, HALF): (Config(128, 32, 8, 2), Config(64, 32, 8, 1), Config(32, 32, 8, 1)),
    ("backward_query", "", 256, HALF): (Config(64, 32, 8, 1), Config(64, 16, 8, 1), Config(64, 16, 8, 1, columns=128)),
    ("backward_query", "sm_90", 256, HALF): (Config(128, 32, 8, 1, columns=128), Config(128, 32, 8, 1, columns=128), Config(128, 16, 8, 1, columns=64)),
    ("backward_query", "sm_100", 256, HALF): (Config(64, 32, 8, 1, 255, 128), Config(64, 32, 8, 1, 255, 128), Config(64, 16, 8, 1, 255, 128)),
    ("backward_table", "", 64, HALF): (Config(32, 64, 8, 1),),
    ("backward_table", "sm_90", 64, HALF): (Config(64, 32, 8, 1),),
    ("backward_table", "sm_100", 64, HALF): (Config(64, 16, 8, 1),),
    ("backward_table", "", 128, HALF): (Config(32, 64, 8, 1),),
    ("backward_table", "sm_90", 128, HALF): (Config(64, 32, 8, 1),),
    ("backward_table", "sm_100", 128, HALF): (Config(64, 16, 8, 1, 168),),
    ("backward_table", "sm_120", 128, HALF): (Config(16, 32, 4, 1),),
    ("backward_table", "", 256, HALF): (Config(32, 64, 8, 1),),
    ("backward_table", "sm_80", 256, HALF): (Config(16, 32, 4, 1),),
    ("backward_table", "sm_90", 256, HALF): (Config(64, 16, 8, 1),),
    ("backward_table", "sm_100", 256, HALF): (Config(16, 32, 8, 1),),
    ("backward_table", "sm_120", 256, HALF): (Config(16, 32, 4, 1),),
    ("backward_bias", "", 64, HALF): (Config(64, 64, 4, 1),),
    ("backward_bias", "sm_80", 64, HALF): (Config(64, 64, 8, 1),),
    ("backward_bias", "sm_120", 64, HALF): (Config(64, 64, 8, 1),),
    ("backward_bias", "", 128, HALF): (Config(64, 64, 4, 1),),
    ("backward_bias", "sm_80", 128, HALF): (Config(64, 32, 4, 1),),
    ("backward_bias", "sm_120", 128, HALF): (Config(64, 32, 4, 1),),
    ("backward_bias", "", 256, HALF): (Config(64, 64, 8, 1),),
    ("backward_bias", "sm_80", 256, HALF): (Config(16, 32, 4, 1),),
    ("backward_bias", "sm_120", 256, HALF): (Config(16, 32, 4, 1),),
    ("decode", "", 64, HALF): (Config(16, 128, 4, 3),),
    ("decode", "", 128, HALF): (Config(16, 64, 4, 3),),
    ("decode", "", 256, HALF): (Config(16, 32, 4, 3),),
    ("forward", "", 64, SINGLE): (Config(32, 32, 8, 2),),
    ("forward", "sm_80", 64, SINGLE): (Config(32, 32, 8, 2, 128),),
    ("forward", "", 128, SINGLE): (Config(32, 16, 8, 1, 128), Config(32, 16, 8, 1, 128), Config(32, 16, 8, 1, 128, 64)),
    ("forward", "", 256, SINGLE): (Config(16, 16, 8, 1, 168), Config(16, 16, 8, 1, 168), Config(32, 16, 8, 1, 168, 64)),
    ("forward", "sm_100", 256, SINGLE): (Config(16, 16, 8, 1, 168), Config(16, 16, 8, 1, 168), Config(32, 16, 8, 1, 255, 64)),
    ("backward_key", "", 64, SINGLE): (Config(32, 32, 8, 1), Config(32, 32, 8, 1), Config(16, 16, 8, 1)),
    ("backward_key", "sm_80", 64, SINGLE): (Config(32, 32, 8, 1), Config(32, 32, 8, 1), Config(16, 16, 8, 1, 255)),
    ("backward_key", "", 128, SINGLE): (Config(16, 16, 8, 1), Config(16, 16, 8, 1), Config(16, 16, 8, 1, columns=64)),
    ("backward_key", "", 256, SINGLE): (Config(16, 16, 8, 1, columns=128), Config(16, 16, 8, 1, columns=128), Config(16, 16, 8, 1, columns=64)),
    ("backward_key", "sm_80", 256, SINGLE): (Config(16, 16, 8, 1, columns=128), Config(16, 16, 8, 1, columns=128), Config(16, 16, 8, 1, columns=32)),
    ("backward_key", "sm_100", 256, SINGLE): (Config(16, 16, 8, 1, columns=128), Config(16, 16, 8, 1, columns=128), Config(16, 16, 8, 1, 255, 64)),
    ("backward_query", "", 64, SINGLE): (Config(16, 32, 8, 1, 128), Config(16, 32, 8, 1, 128), Config(16, 16, 8, 1, 255)),
    ("backward_query", "", 128, SINGLE): (Config(16, 16, 8, 1, 128), Config(16, 16, 8, 1, 128), Config(16, 16, 8, 1, 255)),
    ("backward_query", "", 256, SINGLE): (Config(16, 16, 4, 1, 255), Config(16, 16, 8, 1, 255, 128)),
    ("backward_query", "sm_100", 256, SINGLE): (Config(16, 16, 8, 1, 255, 64), Config(16, 16, 8, 1, 255, 64), Config(16, 16, 8, 1, 255, 128)),
    ("backward_query", "sm_120", 256, SINGLE): (Config(16, 16, 8, 1, 255, 64), Config(16, 16, 8, 1, 255, 128)),
    ("backward_table", "", 64, SINGLE): (Config(16, 16, 8, 1),),
    ("backward_table", "", 128, SINGLE): (Config(16, 16, 8, 1, 168, 64),),
    ("backward_table", "", 256, SINGLE): (Config(16, 16, 8, 1, 168, 128),),
    ("backward_bias", "", 64, SINGLE): (Config(32, 32, 4, 1, columns=32),),
    ("backward_bias", "", 128, SINGLE): (Config(32, 32, 4, 1),),
    ("backward_bias", "", 256, SINGLE): (Config(16, 16, 8, 1, columns=64),),
    ("backward_bias", "sm_90", 256, SINGLE): (Config(16, 16, 4, 1, 255, 64),),
    ("decode", "", 64, SINGLE): (Config(16, 64, 8, 2),),
    ("decode", "sm_80", 64, SINGLE): (Config(16, 64, 8, 2, 128),),
    ("decode", "", 128, SINGLE): (Config(16, 16, 8, 2, 128),),
    ("decode", "", 256, SINGLE): (Config(16, 16, 8, 1),),
}
# fmt: on


def select(kernel: str, shape: Shape) -> Config:
    """The configuration of `kernel` ("forward", ...) for a call of this shape."""
    kinds = TABLE.get((kernel, shape.architecture, shape.width, shape.single))
    if kinds is None:
        kinds = TABLE[kernel, "", shape.width, shape.single]
    kind = KINDS.index(shape.kind)
    if shape.kind == "grouped" and len(kinds) < len(KINDS):
        kind = KINDS.index("rich")
    config = kinds[min(kind, len(kinds) - 1)]
    if shape.short and shape.width == 64 and kernel in ("forward", "backward_query") and config.block_m > 64:
        # Half of a tile of 128 queries would be padding.
        config = config._replace(block_m=64, num_warps=4)
    return config
