"""Times shapes of Hopper's attention forward kernel against each other, each compiled into a library of its own:

    python benchmarks/wgmma_tiles.py build FOLDER             with nvcc, no GPU: some seconds per shape
    python benchmarks/wgmma_tiles.py run FOLDER --output FILE.csv      on a Hopper GPU, about ten seconds

A GPU's clock falls as it warms up. So the shapes are timed in rounds, each in another order, and medians are compared.
csrc/cuda/attention_forward_wgmma.cu names the shape of each kind of call.
"""

import argparse
import csv
import ctypes
import itertools
import pathlib
import statistics
import subprocess
from collections.abc import Iterator
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCE = ROOT / "benchmarks" / "wgmma_tiles.cu"
TOKENS, HIDDEN = 16384, 2048
LENGTHS = (1024, 2048, 4096, 16384)
ROUNDS, CALLS = 7, 4


class Shape(NamedTuple):
    """The template arguments of ForwardWgmmaShape: see csrc/cuda/attention_forward_wgmma.cuh."""

    head_dim: int
    causal: bool
    queries: int
    keys: int
    lazy: bool
    turns: bool

    @property
    def file(self) -> str:
        return "-".join(str(int(part)) for part in self) + ".so"


def shapes() -> Iterator[Shape]:
    tiles = {64: [(192, 128), (192, 112), (128, 128)], 128: [(128, 128), (128, 176), (128, 160)]}
    for head_dim, causal in itertools.product((64, 128), (False, True)):
        first, *others = tiles[head_dim]
        for lazy, turns in itertools.product((False, True), repeat=2):
            yield Shape(head_dim, causal, *first, lazy, turns)
        for tile in others:
            yield Shape(head_dim, causal, *tile, causal, False)


def command(shape: Shape, target: pathlib.Path) -> list[str]:
    macros = [f"-DSHAPE_{name.upper()}={int(value)}" for name, value in shape._asdict().items()]
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'cuda'}"]
    options = ["-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC", "-cudart", "static"]
    return [
        "nvcc",
        *options,
        "-gencode=arch=compute_90a,code=sm_90a",
        *includes,
        *macros,
        "-o",
        str(target),
        str(SOURCE),
    ]


def build(folder: pathlib.Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    for shape in shapes():
        print(shape.file, flush=True)
        subprocess.run(command(shape, folder / shape.file), check=True)
    return 0


def run(folder: pathlib.Path, output: pathlib.Path) -> int:
    import torch
    import torch.nn.functional as F

    here = [shape for shape in shapes() if (folder / shape.file).exists()]
    calls = {shape: ctypes.CDLL(str((folder / shape.file).resolve())).run for shape in here}
    counters = torch.zeros(2, dtype=torch.int32, device="cuda")
    rates: dict[tuple[Shape, int], list[float]] = {}

    def launch(shape, q, k, v, out, lse):
        b, h, s, d = q.shape
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (q, k, v, out, lse, counters)]
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        if calls[shape](*pointers, b, h, s, ctypes.c_float(d**-0.5), stream):
            raise RuntimeError(f"{shape}: the launch was refused")

    for length, head_dim in itertools.product(LENGTHS, (64, 128)):
        shape = TOKENS // length, HIDDEN // head_dim, length, head_dim
        q, k, v = (torch.randn(shape, device="cuda").to(torch.bfloat16) for _ in range(3))
        out, lse = torch.empty_like(q), torch.empty(shape[:3], device="cuda")
        chosen = [s for s in here if s.head_dim == head_dim]
        for s in chosen:
            launch(s, q, k, v, out.fill_(float("nan")), lse)
            truth = F.scaled_dot_product_attention(*(t[:1, -1:].double() for t in (q, k, v)), is_causal=s.causal)
            error = (out[:1, -1:] - truth).norm() / truth.norm()
            if not error < 0.01:
                raise RuntimeError(f"{s}, length {length}: relative error {error.item():.1e}")
        for turn in range(ROUNDS):
            for s in chosen[turn % len(chosen) :] + chosen[: turn % len(chosen)]:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                for _ in range(CALLS):
                    launch(s, q, k, v, out, lse)
                end.record()
                end.synchronize()
                flops = 4 * TOKENS * HIDDEN * length / (2 if s.causal else 1)
                rates.setdefault((s, length), []).append(flops * CALLS / start.elapsed_time(end) / 1e9)
    with open(output, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*Shape._fields, "length", "tflops", "least", "most"])
        for (s, length), found in sorted(rates.items()):
            row = [*map(int, s), length, *(f"{f(found):.1f}" for f in (statistics.median, min, max))]
            print(*row)
            writer.writerow(row)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("build", "run"))
    parser.add_argument("folder", type=pathlib.Path, help="of the libraries")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("wgmma_tiles.csv"))
    options = parser.parse_args()
    return build(options.folder) if options.action == "build" else run(options.folder, options.output)


if __name__ == "__main__":
    raise SystemExit(main())
