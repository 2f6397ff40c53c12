"""Times Triton's attention kernels against those in CUDA C++, for the lines of transformer_fast/backends/measured.py:

    python benchmarks/backend_choice.py FILE.csv [--only TEXT ...] [--seconds 60]

Each call is captured in a CUDA graph, forward and backward apart, so that the kernels alone are timed. One row per
call: microseconds of both, and how many times as fast CUDA C++ is. A backend that cannot run a call has its reason
there.
"""

import argparse
import csv
import itertools
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from transformer_fast.benchmarks.graphs import graphed
from transformer_fast.benchmarks.shapes import HIDDEN, TOKENS

import transformer_fast as tf

BACKENDS = "triton", "cuda"
CALLS, ROUNDS = 4, 5


def heads(batch: int, count: int, length: int, dim: int, key_heads: int | None = None) -> tuple[torch.Tensor, ...]:
    """Query, key and value of shape (B, H, S, D), in memory (B, S, H, D)."""
    shapes = ((batch, length, n, dim) for n in (count, key_heads or count, key_heads or count))
    return tuple(torch.randn(s, device="cuda").to(torch.bfloat16).transpose(1, 2).requires_grad_() for s in shapes)


class Attention(NamedTuple):
    """options: makes the other arguments from batch and length."""

    name: str
    batch: int
    heads: int
    length: int
    dim: int
    options: Callable[[int, int], dict]
    key_heads: int | None = None


def calls() -> Iterator[Attention]:
    def plain(batch, heads, length, dim):
        for causal in (False, True):
            name = f"d{dim} s{length}{' causal' if causal else ''}"
            yield Attention(name, batch, heads, length, dim, lambda b, s, causal=causal: {"is_causal": causal})

    for dim, length in itertools.product((64, 128), (128, 256, 512, 1024, 2048)):
        yield from plain(TOKENS // length, HIDDEN // dim, length, dim)
    for dim, length in ((32, 512), (80, 1024), (96, 1024), (256, 1024)):
        yield from plain(8, 16, length, dim)

    def lengths(b, s):
        return {"key_lengths": torch.randint(s // 5, s // 2, (b,), device="cuda")}

    features: dict[str, Callable[[int, int], dict]] = {
        "key lengths": lengths,
        "dropout": lambda b, s: {"dropout_p": 0.1},
        "key lengths and dropout": lambda b, s: {**lengths(b, s), "dropout_p": 0.1},
        "causal and dropout": lambda b, s: {"is_causal": True, "dropout_p": 0.1},
        "mask": lambda b, s: {"attn_mask": torch.ones(b, 1, 1, s, dtype=torch.bool, device="cuda")},
        "bias": lambda b, s: {"bias": torch.randn(1, 12, s, s, device="cuda").to(torch.bfloat16)},
        "relative bias": lambda b, s: {"relative_bias": tf.RelativeBias(torch.randn(32, 12, device="cuda"), 128, True)},
        "window": lambda b, s: {"window": (64, 64)},
    }
    for length, (name, options) in itertools.product((128, 512), features.items()):
        yield Attention(f"d64 s{length} {name}", TOKENS // length, 12, length, 64, options)
    yield Attention("d64 s2048 window", 8, 12, 2048, 64, lambda b, s: {"window": (256, 256)})
    causal = {"is_causal": True, "enable_gqa": True}
    yield Attention("d128 s2048 causal, grouped heads", 8, 16, 2048, 128, lambda b, s: causal, key_heads=4)


def microseconds(prepare: Callable[[], Callable[[], object]]) -> float:
    """The median time of the call that prepare() makes, in a graph of CALLS of them."""

    def several():
        call = prepare()
        return lambda: [call() for _ in range(CALLS)]

    replay, found = graphed(several), []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        found.append(1000 * start.elapsed_time(end) / CALLS)
    return statistics.median(found)


def measure(backend: str, tensors: tuple[torch.Tensor, ...], options: dict) -> tuple[float, float]:
    """Microseconds of the forward pass without gradients, and of the backward pass."""

    def forward():
        with torch.no_grad():
            return tf.scaled_dot_product_attention(*tensors, **options)

    def backward():
        out = tf.scaled_dot_product_attention(*tensors, **options)
        upstream = torch.randn_like(out)
        return lambda: torch.autograd.grad(out, tensors, upstream, retain_graph=True)

    with tf.backend(backend):
        return microseconds(lambda: forward), microseconds(backward)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=pathlib.Path)
    parser.add_argument("--only", nargs="*", metavar="TEXT", help="calls whose name contains one of these")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no call after this time")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    columns = [f"{backend} {side}" for side in ("forward", "backward") for backend in BACKENDS]
    with open(options.output, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["call", *columns, "cuda is faster, forward", "cuda is faster, backward", "note"])
        for call in calls():
            if time.monotonic() > end or (options.only and not any(text in call.name for text in options.only)):
                continue
            tensors = heads(call.batch, call.heads, call.length, call.dim, call.key_heads)
            arguments = call.options(call.batch, call.length)
            times: dict[str, tuple[float, float]] = {}
            note = ""
            for backend in BACKENDS:
                try:
                    times[backend] = measure(backend, tensors, arguments)
                except RuntimeError as error:
                    note = f"{note}{backend}: {str(error).splitlines()[0][:160]} "
            row = [f"{times[b][side]:.1f}" if b in times else "" for side in range(2) for b in BACKENDS]
            gain = [f"{times[BACKENDS[0]][i] / times[BACKENDS[1]][i]:.2f}" if len(times) == 2 else "" for i in range(2)]
            writer.writerow([call.name, *row, *gain, note.strip()])
            file.flush()
            print(call.name, *row, *gain, note, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
