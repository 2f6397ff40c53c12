"""What has really run on a GPU: the ledgers (verified.json) that benchmarks/gpu.sh writes to benchmarks/results."""

import functools
import importlib.util
import json
import pathlib
from typing import NamedTuple


class Run(NamedTuple):
    """folder: of the results, below benchmarks/results. gpu, commit: what ran. ops: names as in benchmarks/ledger.py,
    whose tests all passed."""

    folder: str
    gpu: str
    commit: str
    ops: frozenset[str]


@functools.cache
def runs() -> tuple[Run, ...]:
    """All runs on a GPU, oldest first."""
    spec = importlib.util.find_spec("transformer_fast.benchmarks")
    found = []
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        results = pathlib.Path(folder) / "results"
        for ledger in results.glob("cuda-*/*/verified.json"):
            machine = ledger.with_name("machine.json")
            about = json.loads(machine.read_text()) if machine.exists() else {}
            gpu, commit = about.get("gpu", ledger.parent.parent.name), about.get("commit", "unknown")
            name = ledger.parent.relative_to(results).as_posix()
            found.append((about.get("time", ""), Run(name, gpu, commit, frozenset(json.loads(ledger.read_text())))))
    return tuple(run for _, run in sorted(found, key=lambda dated: dated[0]))


def names() -> frozenset[str]:
    """The names in benchmarks/ledger.py whose tests have passed on a GPU: e.g. "norm" for the Triton kernels and
    "cuda norm" for the CUDA C++ kernels."""
    return frozenset().union(*(run.ops for run in runs()))


def summary() -> str:
    """What has passed its tests, on which GPU, at which commit. Each op is named with the last run that it passed."""
    last = {op: run for run in runs() for op in run.ops}
    parts = []
    for run in reversed(runs()):
        here = sorted(op for op in last if last[op] is run)
        triton, cuda = [op for op in here if not op.startswith("cuda ")], [op[5:] for op in here if op[:5] == "cuda "]
        kinds = [f"{kind}: {', '.join(ops)}" for kind, ops in (("Triton", triton), ("CUDA C++", cuda)) if ops]
        if kinds:
            parts.append(f"{run.gpu}, commit {run.commit}: {'; '.join(kinds)} (benchmarks/results/{run.folder})")
    return ". ".join(parts) or "nothing"
