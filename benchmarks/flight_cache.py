"""Compiles the Triton kernels of the flight plan on a machine without a GPU, into a cache for the GPU machine:

    python benchmarks/flight_cache.py --output FOLDER [--minutes 20] [--works smoke bench models tune tests]

Smoke tests, benchmark cases, tuning and GPU tests run as they are, on CPU tensors in place of CUDA's, and with a
substitute for Triton's driver whose launch does nothing. So Triton compiles the kernels that it would compile on the
GPU machine, for sm_90. Values are not computed, and are not checked. A later call continues: what the cache has is not
compiled again. flight_kit.py calls this with the Triton of the GPU machine.
"""

import argparse
import contextlib
import fnmatch
import hashlib
import importlib.util
import os
import pathlib
import sys
import tempfile
import time
import types
import unittest.mock
from collections.abc import Callable, Iterator

import torch
from torch.overrides import TorchFunctionMode

ROOT = pathlib.Path(__file__).resolve().parent.parent
CAPABILITY, MULTIPROCESSORS = (9, 0), 132  # of an H100 or H200
WORKS = ("smoke", "bench", "models", "choice", "tune", "tests")


class OnTheCpu(TorchFunctionMode):
    """Makes CPU tensors where CUDA tensors are asked for. Random values are left out, as no kernel reads them."""

    def __torch_function__(self, function, kinds, arguments=(), options=None):
        options = dict(options or {})
        if function is torch.Tensor.cuda:
            return arguments[0]
        if _is_cuda(options.get("device")):
            options["device"] = "cpu"
        if function is torch.randn and not isinstance(options.get("generator"), torch.Generator):
            function = torch.empty
        return function(*("cpu" if _is_cuda(a) else a for a in arguments), **options)


def _is_cuda(value) -> bool:
    return isinstance(value, (str, torch.device)) and str(value).partition(":")[0] == "cuda"


class Stream:
    """In the place of a CUDA stream: nothing runs."""

    def __init__(self, *_, **__):
        pass

    def wait_stream(self, other) -> None:
        pass


class Graph(Stream):
    """In the place of a CUDA graph."""

    def replay(self) -> None:
        pass


@contextlib.contextmanager
def without_a_gpu() -> Iterator[None]:
    """In this context the GPU code of Triton ops runs up to each launch, as on a GPU of CAPABILITY."""
    from transformer_fast.benchmarks import host_time

    host_time.install()
    from transformer_fast.backends import triton as backend
    from transformer_fast.backends import triton_attention

    about = types.SimpleNamespace(
        name="none", major=CAPABILITY[0], minor=CAPABILITY[1], multi_processor_count=MULTIPROCESSORS,
        total_memory=80 << 30,
    )  # fmt: skip
    stream = Stream()
    replaced = [
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "get_device_capability", lambda device=None: CAPABILITY),
        (torch.cuda, "get_device_properties", lambda device=None: about),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "synchronize", lambda device=None: None),
        (torch.cuda, "Stream", Stream),
        (torch.cuda, "stream", lambda stream: contextlib.nullcontext()),
        (torch.cuda, "current_stream", lambda device=None: stream),
        (torch.cuda, "CUDAGraph", Graph),
        (torch.cuda, "graph", lambda *_, **__: contextlib.nullcontext()),
        (torch.cuda, "graph_pool_handle", lambda: (0, 1)),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "default_generators", (types.SimpleNamespace(clone_state=lambda: None),)),
        (backend, "_multiprocessors", lambda device: MULTIPROCESSORS),
        (triton_attention, "_multiprocessors", lambda device: MULTIPROCESSORS),
        (triton_attention, "_capability", lambda device: CAPABILITY),
    ]
    with contextlib.ExitStack() as stack:
        for place, name, value in replaced:
            stack.enter_context(unittest.mock.patch.object(place, name, value))
        stack.enter_context(OnTheCpu())
        yield


def for_another_python(own: str, other: str) -> None:
    """Key the cache for the Triton wheel of another Python. Both wheels differ in libtriton.so alone, whose SHA-256,
    own and other, is part of the key."""
    from triton.runtime import cache

    key = cache.triton_key()
    if own not in key:
        raise RuntimeError("flight_cache: Triton's key does not contain the hash of libtriton.so")
    cache.triton_key = lambda: key.replace(own, other)


def library_hash(triton: pathlib.Path) -> str:
    return hashlib.sha256((triton / "_C" / "libtriton.so").read_bytes()).hexdigest()


# ---- what is run -------------------------------------------------------------------------------------
def works(kinds: tuple[str, ...]) -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call), the most important first."""
    listed = {"smoke": _smoke, "bench": _bench, "models": _models, "choice": _choice, "tune": _tune, "tests": _tests}
    for kind in kinds:
        yield from listed[kind]()


def _smoke():
    from transformer_fast.benchmarks import smoke

    for name in smoke.CASES:
        if name.startswith("triton"):
            yield f"smoke {name}", lambda name=name: smoke.check(name, "cuda")


def _bench():
    from transformer_fast.benchmarks import flight
    from transformer_fast.benchmarks.case import OURS
    from transformer_fast.benchmarks.gpu_cases import gpu_cases

    import transformer_fast as tf

    cases, done = gpu_cases("cuda"), set()

    def run(case):
        with tf.backend("triton"):
            case.candidate(OURS).prepare(case.inputs(False))()

    for call in ("second", "first", "third"):
        for step in flight.plan(call, pathlib.Path("results")):
            if "--only" not in step.command:
                continue
            patterns = step.command[step.command.index("--only") + 1].split(",")
            for case in cases:
                if case.name not in done and any(fnmatch.fnmatch(case.name, p) for p in patterns):
                    done.add(case.name)
                    yield f"bench {case.name}", lambda case=case: run(case)


def _models():
    """One layer of each, of the true widths, in batches of the true size: all layers need the same kernels."""
    from transformer_fast.benchmarks import checkpoints, generation_cases, shapes
    from transformer_fast.benchmarks.case import OURS
    from transformer_fast.benchmarks.model_cases import gpu_model_cases

    from transformer_fast import backends

    def run(case):
        with contextlib.ExitStack() as stack:
            for config in (shapes.BERT_BASE, shapes.BERT_LARGE):
                stack.enter_context(unittest.mock.patch.dict(config, num_hidden_layers=1))
            for _, config in generation_cases.MODELS.values():
                few = {key: 1 for key in ("n_layer", "encoder_layers", "decoder_layers") if key in config}
                stack.enter_context(unittest.mock.patch.dict(config, few))
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            stack.enter_context(unittest.mock.patch.object(checkpoints, "folder", lambda: pathlib.Path(folder)))
            stack.enter_context(unittest.mock.patch.object(generation_cases, "folder", lambda: pathlib.Path(folder)))
            # Not forced: products of matrices are torch's.
            stack.enter_context(unittest.mock.patch.dict(backends.ORDER, cpu=("triton", "eager")))
            stack.callback(backends._select.cache_clear)
            backends._select.cache_clear()
            case.candidate(OURS).prepare(case.inputs(False))()

    for case in (*gpu_model_cases("cuda"), *generation_cases.generation_cases("cuda")):
        if "bf16" in case.name:
            yield f"models {case.name}", lambda case=case: run(case)


def _choice():
    from transformer_fast.benchmarks import backend_choice

    def run(call):
        tensors = backend_choice.heads(call.batch, call.heads, call.length, call.dim, call.key_heads)
        with unittest.mock.patch.object(backend_choice, "microseconds", lambda prepare: prepare()()):
            backend_choice.measure("triton", tensors, call.options(call.batch, call.length))

    for call in backend_choice.calls():
        yield f"choice {call.name}", lambda call=call: run(call)


def _tune():
    import triton
    from transformer_fast.benchmarks import tune

    def run():
        def once(call, **_):
            call()
            return 1.0

        with unittest.mock.patch.object(triton.testing, "do_bench", once):
            tune.few("sm_90", None, float("inf"))

    yield "tune", run


def _tests():
    import pytest
    from transformer_fast.benchmarks import flight
    from transformer_fast.benchmarks.flight_tests import GROUPS

    steps = flight.plan("second", pathlib.Path("results"))
    for group in dict.fromkeys(group for step in steps for group, _ in step.groups):
        for file in GROUPS[group] if not group.startswith("cuda-") else ():
            arguments = [str(ROOT / file), "-q", "-p", "no:xdist", "--tb=no", "-m", "gpu"]
            yield f"tests {file}", lambda arguments=arguments: pytest.main(arguments)


def fill(kinds: tuple[str, ...], seconds: float, only: str = "*") -> int:
    """Run the works until the time is over; returns how many kernels were compiled. Failures after the launches do
    not matter here: nothing was computed."""
    from triton import knobs

    compiled = [0]
    end = time.monotonic() + seconds

    def note(cache_hit: bool, **_):
        compiled[0] += not cache_hit
        if time.monotonic() > end:
            raise KeyboardInterrupt

    knobs.compilation.listener = note
    import numerics

    numerics.assert_as_accurate = lambda *_, **__: None  # before test modules import it
    with without_a_gpu():
        for name, call in works(kinds):
            if not fnmatch.fnmatch(name, only):
                continue
            if time.monotonic() > end:
                print(f"no time left for {name}", flush=True)
                break
            before, begun, why = compiled[0], time.monotonic(), ""
            try:
                call()
            except (KeyboardInterrupt, Exception) as error:
                why = f", {type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"
            print(f"{name}: {compiled[0] - before} kernels, {time.monotonic() - begun:.0f} s{why}", flush=True)
    return compiled[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, required=True, help="the cache")
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--only", default="*", metavar="PATTERN", help="works by name, as printed")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="compile nothing more after this time")
    parser.add_argument("--library-hash", help="SHA-256 of libtriton.so on the GPU machine")
    options = parser.parse_args()
    os.environ["TRITON_CACHE_DIR"] = str(options.output.resolve())
    os.environ["TRITON_STORE_BINARY_ONLY"] = "1"
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    if options.library_hash:
        triton = pathlib.Path(importlib.util.find_spec("triton").origin).parent
        for_another_python(library_hash(triton), options.library_hash)
    print(f"{fill(tuple(options.works), 60 * options.minutes, options.only)} kernels were compiled")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
