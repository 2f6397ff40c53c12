"""Measures the host time of a call of a Triton op: python benchmarks/host_time.py [--record]

Runs on a machine without a GPU, with a substitute for Triton's driver whose launch does nothing: kernels are compiled
for sm_90 (once, into Triton's cache) and never run. Prints microseconds of processor time per call, of its bare
launches through Triton's own launcher, and the difference, as medians of interleaved rounds. --record writes them to
benchmarks/results/host-time/<date>-<commit>.csv.
"""

import argparse
import csv
import statistics
import sys
import time
import types

import torch

COLUMNS = ["call", "us", "launches", "bare_us", "over_us", "rounds", "machine", "python", "torch", "triton", "commit"]


class _Driver:
    """The part of a CUDA driver that Triton uses."""

    def __init__(self):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", 90, 32)
        properties = {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}
        self.utils = types.SimpleNamespace(
            load_binary=lambda name, kernel, shared, device: (1, 2, 0, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=lambda device: properties,
        )
        self.launches = 0

    def launcher_cls(self, src, metadata):
        def launch(*arguments):
            self.launches += 1

        return launch

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def set_current_device(self, device):
        pass

    def get_current_target(self):
        return self.target

    def is_active(self):
        return True


def install() -> _Driver:
    """Make Triton's launches do nothing, and the Triton backend take CPU tensors."""
    import triton

    driver = _Driver()
    triton.runtime.driver.set_active(driver)
    from transformer_fast.backends import triton as backend

    backend.interpreting = lambda: True  # so that it takes CPU tensors
    from transformer_fast.ops import _attention_direct

    _attention_direct.signature = lambda *_: None  # a fast path that GPU tensors do not take
    return driver


def cases():
    import transformer_fast as tf

    q, k, v = (torch.randn(2, 8, 300, 64).bfloat16() for _ in range(3))
    cache = [torch.randn(2, 8, 1024, 64).bfloat16() for _ in range(2)]
    one = torch.randn(2, 8, 1, 64).bfloat16()
    lengths = torch.tensor([5, 700], dtype=torch.int32)
    x, residual = (torch.randn(64, 768).bfloat16() for _ in range(2))
    w, b = torch.randn(768), torch.randn(768)
    forward = {
        "attention": lambda: tf.scaled_dot_product_attention(q, k, v, is_causal=True),
        "decode": lambda: tf.kv_cache_attention(one, one, one, *cache, lengths),
        "layer_norm": lambda: tf.layer_norm(x, (768,), w, b),
        "add_layer_norm": lambda: tf.add_layer_norm(x, residual, w, b),
        "bias_activation": lambda: tf.bias_activation(x, b, "gelu"),
    }
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    rows = [t.clone().requires_grad_() for t in (x, w, b)]
    for _ in range(2):  # a kind of call is launched at once from its second time on, and so are its gradients
        tf.scaled_dot_product_attention(*leaves, is_causal=True), tf.layer_norm(rows[0], (768,), *rows[1:])
    graphs = {
        "attention backward": (tf.scaled_dot_product_attention(*leaves, is_causal=True), leaves),
        "layer_norm backward": (tf.layer_norm(rows[0], (768,), *rows[1:]), rows),
    }

    def gradients(out, inputs):
        grad = torch.ones_like(out)
        return lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)

    with_gradients = {
        "attention, to be differentiated": lambda: tf.scaled_dot_product_attention(*leaves, is_causal=True),
        "layer_norm, to be differentiated": lambda: tf.layer_norm(rows[0], (768,), *rows[1:]),
    }
    return forward, with_gradients | {name: gradients(*graph) for name, graph in graphs.items()}


def bare(call):
    """A function that only makes the launches of `call`, through Triton's launcher."""
    from triton.runtime.jit import JITFunction

    launches, run = [], JITFunction.run

    def note(self, *arguments, grid, warmup, **options):
        launches.append((self, arguments, grid, options))
        return run(self, *arguments, grid=grid, warmup=warmup, **options)

    JITFunction.run = note
    try:
        from transformer_fast.backends import triton_launch

        triton_launch.forget()
        call()
    finally:
        JITFunction.run = run

    def again():
        for kernel, arguments, grid, options in launches:
            kernel[grid](*arguments, **options)

    return again, len(launches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    if torch.cuda.is_available():
        sys.exit("host_time: wanted a machine without a GPU")
    install()
    torch.set_num_threads(1)
    import transformer_fast as tf

    def seconds(call):
        begun = time.thread_time()
        for _ in range(options.calls):
            call()
        return (time.thread_time() - begun) / options.calls * 1e6

    rows = []
    with tf.backend("triton"):
        forward, backward = cases()
        for name, call in {**forward, **backward}.items():
            with torch.set_grad_enabled(name in backward):
                call(), call()
                launch, count = bare(call)
                pairs = [(seconds(call), seconds(launch)) for _ in range(options.rounds)]
            ours, theirs = (statistics.median(times) for times in zip(*pairs))
            least = min(a for a, _ in pairs) - min(b for _, b in pairs)
            text = f"{name:34s} {ours:7.1f} us, {count} bare launches {theirs:7.1f} us"
            print(f"{text}, over them {ours - theirs:7.1f} us (of the least {least:.1f})", flush=True)
            rows.append([name, f"{ours:.1f}", count, f"{theirs:.1f}", f"{ours - theirs:.1f}", options.rounds])
    if options.record:
        record(rows)


def record(rows: list[list]) -> None:
    from transformer_fast.benchmarks import results

    about = results.machine("cpu")
    if about["dirty"]:
        sys.exit("host_time: the record names a commit, and the checkout has changes")
    file = results.ROOT / "host-time" / f"{about['time'][:10]}-{about['commit'][:7]}.csv"
    file.parent.mkdir(exist_ok=True)
    versions = about["versions"]
    more = [about["device"], about["python"], versions["torch"], versions["triton"], about["commit"]]
    with file.open("w", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerows([COLUMNS, *([*row, *more] for row in rows)])
    print(file)


if __name__ == "__main__":
    main()
