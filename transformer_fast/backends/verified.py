"""What has really run on a GPU: the ledgers (verified.json) that benchmarks/gpu.sh writes to benchmarks/results."""

import functools
import importlib.util
import json
import pathlib


@functools.cache
def names() -> frozenset[str]:
    """The names in benchmarks/ledger.py whose tests have passed on a GPU: e.g. "norm" for the Triton kernels and
    "cuda norm" for the CUDA C++ kernels."""
    spec = importlib.util.find_spec("transformer_fast.benchmarks")
    folders = (spec.submodule_search_locations or ()) if spec else ()
    runs = (run for folder in folders for run in pathlib.Path(folder).glob("results/cuda-*/*/verified.json"))
    return frozenset(name for run in runs for name in json.loads(run.read_text()))
