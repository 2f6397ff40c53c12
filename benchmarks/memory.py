"""Peak memory of a piece of work, measured in a separate process.

The work is a generator function, named "package.module:function", that yields twice:

    def work(**arguments):
        ...warm up on something tiny, make the inputs...
        yield      # memory resident now does not count
        ...build: models, weights in panels...
        yield      # memory that building has freed does not count
        ...run...

The result is the highest resident size (GPU: allocated bytes) of the run minus that at the first yield: weights and
memory that a library keeps count, the inputs and the libraries' code do not.
"""

import ctypes
import gc
import importlib
import json
import pathlib
import resource
import subprocess
import sys

import psutil
import torch

__all__ = ["peak_memory_mb"]

_CLEAR_REFS = pathlib.Path("/proc/self/clear_refs")
_STATUS = pathlib.Path("/proc/self/status")


def peak_memory_mb(work: str, *, timeout: float = 600.0, **arguments) -> float:
    """Run `work` in a new process; megabytes (10^6 bytes). Raises RuntimeError with its output if it fails."""
    command = [sys.executable, "-m", __name__, work, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}")
    return float(done.stdout.strip().splitlines()[-1])


def _peak_bytes() -> int:
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _release() -> None:
    """Return freed memory to the system, so that it is not part of the baseline."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _reset_peak() -> None:
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return  # not Linux: the result is the peak of the whole process, an upper bound


def _measure(work: str, arguments: dict) -> float:
    module, function = work.split(":")
    steps = getattr(importlib.import_module(module), function)(**arguments)
    cuda = arguments.get("device") == "cuda"
    next(steps)
    _release()
    _reset_peak()
    baseline = torch.cuda.memory_allocated() if cuda else psutil.Process().memory_info().rss
    next(steps)
    _release()
    _reset_peak()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in steps:
        raise RuntimeError(f"{work} must yield twice")
    peak = torch.cuda.max_memory_allocated() if cuda else _peak_bytes()
    return (peak - baseline) / 1e6


if __name__ == "__main__":
    print(f"{_measure(sys.argv[1], json.loads(sys.argv[2])):.3f}")
