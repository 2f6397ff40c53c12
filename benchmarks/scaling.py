"""Communication of context parallelism, counted and by formula, and the simulated speed-up on many nodes.

    python benchmarks/scaling.py [--output benchmarks/results/scaling]

Bytes that one process sends in forward and backward are counted with two and four gloo processes. The processor time of
attention on one thread is measured; the curve up to 64 nodes is simulated from it, with an assumed number of threads
per node and assumed bandwidths.
Writes <date>-<commit>.csv and .png.
"""

import argparse
import csv
import datetime
import pathlib
import platform
import subprocess
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh

import transformer_fast as tf
from transformer_fast.distributed import collectives

SHAPE = {"batch": 1, "heads": 8, "key_heads": 4, "length": 256, "dim": 32}
MEASURED = {"batch": 1, "heads": 12, "key_heads": 12, "length": 4096, "dim": 64}
SIMULATED = MEASURED | {"length": 65536}
THREADS = 32  # assumed, per node, each as fast as the measured one
BANDWIDTHS = {"1 GbE": 0.125e9, "10 GbE": 1.25e9, "100 GbE": 12.5e9}  # assumed, bytes/s one way


def ring_bytes(size: int, batch: int, heads: int, key_heads: int, length: int, dim: int, item: int = 4) -> int:
    """Bytes that one process sends, forward and backward: keys and values twice, and their gradients in float32."""
    part = 2 * batch * key_heads * length // size * dim
    return 2 * (size - 1) * part * item + size * part * 4


def ulysses_bytes(size: int, batch: int, heads: int, key_heads: int, length: int, dim: int, item: int = 4) -> int:
    """Bytes that one process sends: query, key, value and output, forward and backward; the log-sum-exp, forward."""
    rows = batch * length // size
    each = rows * (2 * heads + 2 * key_heads) * dim * item
    return (2 * each + rows * heads * 4) * (size - 1) // size


FORMULAS = {"ring": ring_bytes, "ulysses": ulysses_bytes}


def attend(q, k, v) -> None:
    tf.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).sum().backward()


def tensors(batch: int, heads: int, key_heads: int, length: int, dim: int) -> list[torch.Tensor]:
    return [torch.randn(batch, n, length, dim) for n in (heads, key_heads, key_heads)]


def count(rank: int, size: int, rendezvous: str, result: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
    sent = 0
    start, swap = collectives.Ring.start, collectives._swap

    def counted_start(self, parts):
        nonlocal sent
        sent += sum(t.numel() * t.element_size() for t in parts)
        return start(self, parts)

    def counted_swap(x, group):
        nonlocal sent
        sent += x.numel() * x.element_size() * (size - 1) // size  # a process keeps its own slice
        return swap(x, group)

    collectives.Ring.start, collectives._swap = counted_start, counted_swap
    found = {}
    for method in FORMULAS:
        sent = 0
        cp = tf.distributed.context_parallel(init_device_mesh("cpu", (size,)), method=method)
        parts = [cp.shard(t, 2).requires_grad_() for t in tensors(**SHAPE)]
        with cp:
            attend(*parts)
        found[method] = sent
    if rank == 0:
        torch.save(found, result)
    dist.barrier()
    dist.destroy_process_group()


def counted(size: int) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(count, (size, f"{folder}/rendezvous", f"{folder}/found.pt"), nprocs=size)
        return torch.load(f"{folder}/found.pt")


def measured_seconds(repeats: int) -> float:
    """The least processor time of one attention, forward and backward, on one thread."""
    torch.set_num_threads(1)
    parts = [t.requires_grad_() for t in tensors(**MEASURED)]
    found = []
    for _ in range(repeats + 1):
        start = time.process_time()
        attend(*parts)
        found.append(time.process_time() - start)
    return min(found[1:])


def simulated_speedup(method: str, size: int, seconds: float, bandwidth: float) -> float:
    """Speed-up over one node at SIMULATED's length. The ring sends while it computes, and recomputes the forward (4.5
    products instead of 3.5); Ulysses waits for its exchanges."""
    alone = seconds / THREADS * (SIMULATED["length"] / MEASURED["length"]) ** 2
    if size == 1:
        return 1.0
    moving = FORMULAS[method](size, **SIMULATED) / bandwidth
    if method == "ring":
        return alone / max(alone / size * 4.5 / 3.5, moving)
    return alone / (alone / size + moving)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("benchmarks/results/scaling"))
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    rows = []
    for size in (2, 4):
        for method, sent in counted(size).items():
            rows.append(("bytes a process sends, counted", method, size, "", sent))
            rows.append(("bytes a process sends, by formula", method, size, "", FORMULAS[method](size, **SHAPE)))
    seconds = measured_seconds(arguments.repeats)
    rows.append(("processor seconds of one attention on one thread, measured", "", 1, "", round(seconds, 4)))
    curves: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for link, bandwidth in BANDWIDTHS.items():
        for method in FORMULAS:
            for size in (1, 2, 4, 8, 16, 32, 64):
                if method == "ulysses" and MEASURED["heads"] % size:
                    continue  # more processes than heads
                speedup = simulated_speedup(method, size, seconds, bandwidth)
                rows.append(("speed-up, simulated", method, size, link, round(speedup, 2)))
                curves.setdefault((method, link), []).append((size, speedup))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"{datetime.date.today()}-{commit or 'unknown'}.csv"
    machine = processor()
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("what", "method", "processes", "link", "value", "machine", "torch"))
        writer.writerows((*row, machine, torch.__version__) for row in rows)
    draw(curves, path.with_suffix(".png"))
    print(path.read_text())


def processor() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def draw(curves: dict, path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    axes.plot([1, 64], [1, 64], color="grey", linewidth=0.8, label="as many times as nodes")
    for (method, link), points in curves.items():
        axes.plot(*zip(*points), "o-" if method == "ring" else "s--", label=f"{method}, {link}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlabel("nodes")
    axes.set_ylabel("speed-up of attention")
    axes.set_title(f"SIMULATED: {SIMULATED['length']} tokens, measured compute, assumed nodes")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
