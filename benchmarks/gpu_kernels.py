"""How long each kernel of a call runs on this GPU, by torch's profiler: python benchmarks/gpu_kernels.py FILE.csv

One row per call and kernel: launches per call and microseconds per launch. The GPU is cooler, and its clock higher,
than in a benchmark that runs for seconds; the shares of the kernels are what to look at.
"""

import contextlib
import csv
import itertools
import re
import sys
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from transformer_fast.benchmarks.shapes import HIDDEN, TOKENS

import transformer_fast as tf

CALLS = 5
NORMS = ((4096, 768), (32768, 1024), (32768, 4096), (32768, 8192))  # (rows, width)


def random(*shape: int, grad: bool = True) -> torch.Tensor:
    return torch.randn(shape, device="cuda").to(torch.bfloat16).requires_grad_(grad)


def backward(out: torch.Tensor, leaves: tuple[torch.Tensor, ...]) -> Callable[[], object]:
    upstream = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True)


def attention_calls(backend: str) -> Iterator[tuple[str, Callable[[], object]]]:
    for dim, length, causal in itertools.product((64, 128), (2048, 16384), (False, True)):
        leaves = tuple(random(TOKENS // length, HIDDEN // dim, length, dim) for _ in range(3))

        def forward(leaves=leaves, causal=causal):
            return tf.scaled_dot_product_attention(*leaves, is_causal=causal)

        name = f"{backend} attention d{dim} s{length}{' causal' if causal else ''}"
        yield name, forward
        yield f"{name} backward", backward(forward(), leaves)


def norm_calls(backend: str) -> Iterator[tuple[str, Callable[[], object]]]:
    for rows, width in NORMS:
        leaves = random(rows, width), random(width), random(width)
        residual = random(rows, width)

        def norm(leaves=leaves, width=width):
            x, weight, bias = leaves
            return (F if backend == "torch" else tf).layer_norm(x, (width,), weight, bias)

        name = f"{backend} layer_norm {rows}x{width}"
        yield name, norm
        yield f"{name} backward", backward(norm(), leaves)
        if backend == "torch":
            yield f"torch copy {rows}x{width}", leaves[0].detach().clone
        else:
            x, weight, bias = leaves
            yield (
                f"{backend} add_layer_norm {rows}x{width}",
                lambda x=x, r=residual, w=weight, b=bias: tf.add_layer_norm(x, r, w, b),
            )


def name_of(kernel: str) -> str:
    """The name of a kernel without its namespaces and template arguments."""
    return re.split(r"[<(]", kernel.removeprefix("void ").replace("(anonymous namespace)::", ""))[0].rpartition("::")[2]


def kernels(call: Callable[[], object]) -> Iterator[tuple[str, float, float]]:
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()
    for event in sorted(found.key_averages(), key=lambda e: -e.self_device_time_total):
        if event.self_device_time_total:
            yield name_of(event.key), event.count / CALLS, event.self_device_time_total / event.count


def main(output: str) -> int:
    with open(output, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["call", "kernel", "launches", "microseconds"])
        for backend in ("cuda", "triton", "torch"):
            with contextlib.nullcontext() if backend == "torch" else tf.backend(backend):
                calls = attention_calls(backend) if backend != "torch" else ()
                for name, call in itertools.chain(norm_calls(backend), calls):
                    for kernel, launches, microseconds in kernels(call):
                        writer.writerow([name, kernel, f"{launches:g}", f"{microseconds:.1f}"])
                    file.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
