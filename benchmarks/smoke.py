"""Smoke tests of each family of GPU kernels, in seconds: python benchmarks/smoke.py [NAME ...]

One call of each is compared with float64, forward and backward. Each runs in its own process, in parallel, so one that
hangs or leaves the GPU in an error affects no other. --output FILE: {name: {"passed": ..., "seconds": ...,
"message": ...}}. On a CPU (--device cpu) they run in the emulator and the interpreter of the tests.
"""

import argparse
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable

LIMIT = 40.0  # seconds per process: imports, compilation and the call

Maker = Callable[[str], tuple[str, str, Callable, dict]]
CASES: dict[str, Maker] = {}


def case(function: Maker) -> Maker:
    CASES[function.__name__.strip("_").replace("_", "-")] = function
    return function


def _heads(device, length, dim, heads=4, dtype=None):
    import torch

    return torch.randn(2, length, heads, dim, device=device).to(dtype or torch.bfloat16).transpose(1, 2)


def _attention(forward: str, backward: str, dim: int, **options):
    """Attention whose forward and backward run on the given backends."""

    def make(device):
        import transformer_fast as tf

        tensors = {name: _heads(device, 300, dim) for name in ("query", "key", "value")}
        return forward, backward, lambda **t: tf.scaled_dot_product_attention(**t, **options), tensors

    return make


CASES["cuda-forward-wgmma"] = _attention("cuda", "", 64, is_causal=True)
CASES["cuda-forward-mma"] = _attention("cuda", "", 80)
CASES["cuda-backward-wgmma"] = _attention("eager", "cuda", 128, is_causal=True)
CASES["cuda-backward-mma"] = _attention("eager", "cuda", 80)
CASES["triton-attention"] = _attention("triton", "triton", 64, is_causal=True)


def _norm(backend: str):
    def make(device):
        import torch

        import transformer_fast as tf

        x, residual = (torch.randn(300, 1024, device=device) for _ in range(2))
        weight, bias = (torch.randn(1024, device=device) for _ in range(2))
        return backend, backend, tf.add_layer_norm, {"x": x, "r": residual, "w": weight, "b": bias}

    return make


CASES["cuda-norm"], CASES["triton-norm"] = _norm("cuda"), _norm("triton")


@case
def _cuda_decode(device):
    import torch

    import transformer_fast as tf

    tensors = {"query": _heads(device, 1, 64), "key": _heads(device, 900, 64), "value": _heads(device, 900, 64)}
    lengths = torch.tensor([900, 33], device=device)
    return "cuda", "", lambda **t: tf.scaled_dot_product_attention(**t, key_lengths=lengths), tensors


@case
def _triton_decode(device):
    _, _, call, tensors = _cuda_decode(device)
    return "triton", "", call, tensors


def _rotary(backend):
    def make(device):
        import torch

        import transformer_fast as tf

        angle = torch.randn(40, 32, device=device)
        x = torch.randn(2, 40, 4, 64, device=device)
        return backend, backend, lambda x: tf.rotary_embedding(x, angle.cos(), angle.sin()), {"x": x}

    return make


CASES["cuda-rotary"], CASES["triton-rotary"] = _rotary("cuda"), _rotary("triton")


@case
def _triton_activation(device):
    import torch

    import transformer_fast as tf

    x, bias = torch.randn(300, 1024, device=device), torch.randn(1024, device=device)
    return "triton", "triton", tf.bias_activation, {"x": x, "b": bias}


@case
def _triton_cross_entropy(device):
    import torch

    import transformer_fast as tf

    target = torch.arange(60, device=device)
    return "triton", "triton", lambda x: tf.cross_entropy(x, target), {"x": torch.randn(60, 500, device=device)}


@case
def _triton_embedding(device):
    import torch

    import transformer_fast as tf

    ids, word = torch.arange(64, device=device).view(2, 32) % 50, torch.randn(50, 256, device=device)
    return "triton", "triton", lambda word: tf.embedding_layer_norm(ids, word), {"word": word}


@case
def _triton_additive(device):
    import torch

    import transformer_fast as tf

    tensors = {name: torch.randn(2, n, 64, device=device) for name, n in (("q", 7), ("k", 33), ("v", 33))}
    return "triton", "triton", tf.additive_attention, tensors | {"w": torch.randn(64, device=device)}


def check(name: str, device: str) -> str:
    """Run a smoke test. Raises if the values are wrong; returns a line that describes the test."""
    import torch
    from numerics import GRADIENT, OUTPUT, assert_as_accurate

    import transformer_fast as tf

    torch.manual_seed(0)
    forward, backward, call, tensors = CASES[name](device)

    def run(first, second, dtype):
        leaves = {n: t.to(dtype or t.dtype).requires_grad_(bool(backward)) for n, t in tensors.items()}
        arguments = leaves if all(n in ("query", "key", "value") for n in leaves) else list(leaves.values())
        with tf.backend(first):
            out = call(**arguments) if isinstance(arguments, dict) else call(*arguments)
        outs = out if isinstance(out, tuple) else (out,)
        found = [o.detach() for o in outs]
        if backward:
            torch.manual_seed(1)
            grads = [torch.randn(o.shape, device=device).to(o.dtype) for o in outs]
            with tf.backend(second):
                found += torch.autograd.grad(outs, list(leaves.values()), grads)
        return found, len(outs)

    with _machine(forward, backward, device):
        ours, count = run(forward, backward, None)
    truth, plain = run("eager", "eager", torch.float64)[0], run("eager", "eager", None)[0]
    for i, three in enumerate(zip(ours, truth, plain)):
        assert_as_accurate(*three, OUTPUT if i < count else GRADIENT, f"{name}, tensor {i}")
    if device == "cuda":
        torch.cuda.synchronize()
    return f"{len(ours)} tensors as accurate as plain PyTorch"


def _machine(forward: str, backward: str, device: str):
    if device == "cuda":
        return contextlib.nullcontext()
    if "cuda" in (forward, backward):
        import cuda_emulator

        return cuda_emulator.active()
    import triton_interpreter

    return triton_interpreter.active()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[[], *CASES])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--one", action="store_true", help="run one name in this process")
    options = parser.parse_args()
    if options.one:
        if options.device == "cpu":
            import triton_interpreter  # noqa: F401  before anything imports Triton
        print(check(options.names[0], options.device))
        return 0
    names = options.names or list(CASES)
    command = [sys.executable, __file__, "--one", "--device", options.device]
    begun = time.monotonic()
    running = {
        name: subprocess.Popen([*command, name], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               start_new_session=True)
        for name in names
    }  # fmt: skip
    found: dict[str, dict] = {}
    for name, process in running.items():
        try:
            text, _ = process.communicate(timeout=max(0.1, LIMIT - (time.monotonic() - begun)))
        except subprocess.TimeoutExpired:
            process.kill()
            text = f"took over {LIMIT:.0f} s\n{process.communicate()[0]}"
        passed = process.returncode == 0
        found[name] = {"passed": passed, "seconds": round(time.monotonic() - begun, 1), "message": text[-3000:]}
        print(f"{'ok    ' if passed else 'FAILED'} {name}: {(text.strip().splitlines() or [''])[-1][:160]}", flush=True)
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            fresh = options.output.with_suffix(".new")
            fresh.write_text(json.dumps(found, indent=1))
            os.replace(fresh, options.output)
    return int(not all(one["passed"] for one in found.values()))


if __name__ == "__main__":
    raise SystemExit(main())
