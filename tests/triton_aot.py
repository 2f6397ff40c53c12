"""Compiles Triton kernels ahead of time, without a GPU, and reports the compiler's results.

A test file lists its launches in `cases(arch, scope)`: names and functions that call a launcher of kernels/ with meta
tensors. The scopes are:

- "test": as many as a test run has time for. `aot_reports` compiles them in a separate process, because Triton runs as
  an interpreter in pytest's process.
- "record": every row of the kernels' tables (tile, warps, stages, by width and kind of call), in 16 bits and float32,
  for every architecture, each with the features that need most registers and shared memory. float16 compiles to the
  same code as bfloat16 except for the type, so only a sample of it.
- "every": all features at all widths in all dtypes, most of which are redundant. It takes days on two cores.

By hand, with any Triton, the record's kernels or some of them:

    python tests/triton_aot.py
    python tests/triton_aot.py tests/native/test_triton_norm_aot.py --arch 80 90 --only bfloat16
    python tests/triton_aot.py --record [--minutes 30]

This prints a line per kernel and case, says which ones fail the file's `check`, and exits with 1 if any does.
`--record` writes the summary that is committed, benchmarks/results/ahead-of-time/triton-<version>.csv. `--minutes`
stops early; what is compiled is kept, and the record says how many of how many. `--every-combination` selects the last
scope. Reports are cached in $TRANSFORMER_FAST_AOT_CACHE (default: in the temporary folder) by the hash of kernel,
types, options, GPU and Triton.
"""

import argparse
import collections
import contextlib
import csv
import hashlib
import importlib.util
import json
import multiprocessing
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Set
from types import ModuleType
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Bytes of shared memory that one block may use.
SHARED_MEMORY = {80: 166912, 90: 232448, 100: 232448, 120: 101376}
ARCHS = tuple(SHARED_MEMORY)
PROCESSES = 2
HALVES = {"bfloat16": "*bf16", "float16": "*fp16"}


class Launch(NamedTuple):
    kernel: Any
    args: tuple
    kwargs: dict


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Kernel launches in this context are recorded and not run."""
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []
    run = JITFunction.run
    JITFunction.run = lambda self, *args, grid, warmup, **kwargs: launches.append(Launch(self, args, kwargs))
    try:
        yield launches
    finally:
        JITFunction.run = run


def _source(launch: Launch):
    """The source that Triton's own launch would compile, and its options. Types and alignments come from the
    arguments."""
    from triton.backends.compiler import BaseBackend
    from triton.compiler import ASTSource
    from triton.runtime.jit import native_specialize_impl

    kernel = launch.kernel
    values = dict(zip(kernel.arg_names, launch.args)) | launch.kwargs
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = values.pop(parameter.name)
        if parameter.is_constexpr:
            kind, key = "constexpr", value
        else:
            specialize = not parameter.do_not_specialize
            align = not parameter.do_not_specialize_on_alignment
            kind, key = native_specialize_impl(BaseBackend, value, parameter.is_const, specialize, align)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[parameter.name] = key
        elif key:
            attributes[(index,)] = BaseBackend.parse_attr(key)
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes), values


def aot_report(launch: Launch, arch: int) -> dict:
    """Registers per thread, spills, shared memory and the relevant instructions, read from the SASS."""
    import triton
    from triton.backends.compiler import GPUTarget

    source, options = _source(launch)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    tools = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True).stdout
        sass = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True).stdout
    opcodes = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+ +)?([A-Z][\w.]*)", sass, re.M)

    def count(pattern: str) -> int:
        return sum(bool(re.match(pattern, o)) for o in opcodes)

    return {
        "kernel": launch.kernel.fn.__name__,
        "arch": arch,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "warps": compiled.metadata.num_warps,
        "shared": compiled.metadata.shared,
        "spills": count(r"(STL|LDL)\b"),
        "instructions": len(opcodes),
        "loads_128": count(r"LD(G|GSTS)\.E\S*\.128"),
        "loads_narrow": count(r"LDG\.E\S*\.[US](8|16)\b"),
        "stores_128": count(r"STG\.E\S*\.128"),
        "stores_narrow": count(r"STG\.E\S*\.[US](8|16)\b"),
        "wgmma": count(r"HGMMA"),
        "mma": count(r"HMMA|UTC\w*MMA"),
    }


def assert_runs_well(report: dict, registers: int = 255) -> None:
    """Assert that a kernel fits shared memory and register file, does not spill, and uses at most `registers` registers
    per thread."""
    assert report["shared"] <= SHARED_MEMORY[report["arch"]], report
    assert report["spills"] == 0, report
    assert report["registers"] <= registers, report
    assert report["registers"] * report["warps"] * 32 <= 65536, report


class Job(NamedTuple):
    """One kernel to compile. key: what its report depends on. dtype: dtype of the data."""

    file: ModuleType
    case: str
    launch: Launch
    arch: int
    dtype: str
    key: str


def _jobs(file: ModuleType, arch: int, scope: str, only: str = "", kernels: str = "") -> Iterator[Job]:
    """The kernels that a file's cases launch, each once, under the first case that launches it."""
    import triton

    seen = set()
    for name, call in file.cases(arch, scope).items():
        if only not in name:
            continue
        with recorded() as launches:
            call()
        for launch in launches:
            if not re.search(kernels, launch.kernel.fn.__name__):
                continue
            source, options = _source(launch)
            text = " ".join([source.hash(), str(sorted(options.items())), str(arch), triton.__version__])
            key = hashlib.sha256(text.encode()).hexdigest()
            if key not in seen:
                seen.add(key)
                kinds = set(source.signature.values())
                dtype = next((name for name, kind in HALVES.items() if kind in kinds), "float32")
                yield Job(file, name, launch, arch, dtype, key)


def _folder() -> pathlib.Path:
    default = pathlib.Path(tempfile.gettempdir()) / "transformer_fast_aot"
    return pathlib.Path(os.environ.get("TRANSFORMER_FAST_AOT_CACHE", default))


_pending: list[Job] = []  # forked workers read their jobs here, because launches cannot be pickled


def _report_path(job: Job) -> pathlib.Path:
    return _folder() / "reports" / f"{job.key}.json"


def known(job: Job) -> dict | None:
    """The cached report of a kernel; None if it has not been compiled."""
    path = _report_path(job)
    return json.loads(path.read_text()) | {"dtype": job.dtype} if path.exists() else None


def _compile(index: int) -> dict:
    job = _pending[index]
    report = known(job)
    if report is not None:
        return report
    path = _report_path(job)
    report = aot_report(job.launch, job.arch)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(f".{os.getpid()}")
    fresh.write_text(json.dumps(report))
    fresh.replace(path)
    return report | {"dtype": job.dtype}


def reports(jobs: list[Job], processes: int) -> Iterator[tuple[Job, dict]]:
    """Yields each job with its report, in the order of the jobs."""
    _pending[:] = jobs
    if processes == 1:
        yield from zip(jobs, map(_compile, range(len(jobs))))
        return
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        yield from zip(jobs, pool.imap(_compile, range(len(jobs))))


def aot_reports(file: str, arch: int) -> dict[str, list[dict]]:
    """Case name -> reports, for the "test" cases of a test file, compiled in another process."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, file, "--arch", str(arch), "--json"]
    if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1:
        command.append("--processes=1")  # pytest's workers use all cores already
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout)


def assert_compiles(file: str, arch: int, check: Callable[[dict], None], kernels: Set[str] = frozenset()) -> dict:
    """Compile the test run's cases of a test file and `check` each report. With `kernels`: these are all there are.
    Returns case name -> reports."""
    found = aot_reports(file, arch)
    every = [report for reports in found.values() for report in reports]
    assert every and (not kernels or {report["kernel"] for report in every} == kernels), found
    for report in every:
        check(report)
    return found


RECORD = [
    "triton", "commit", "kernel", "dtype", "arch", "configurations", "compiled", "failed", "most_registers",
    "most_shared_bytes", "spill_instructions", "wgmma",
]  # fmt: skip


def _spread(jobs: list[Job]) -> list[Job]:
    """The jobs in an order such that a run that is stopped has compiled every kernel, dtype and architecture about
    equally often."""
    seen: collections.Counter = collections.Counter()
    turns = []
    for job in jobs:
        group = job.launch.kernel.fn.__name__, job.dtype, job.arch
        turns.append(seen[group])
        seen[group] += 1
    return [job for _, job in sorted(zip(turns, jobs), key=lambda pair: pair[0])]


def fails(job: Job, report: dict) -> bool:
    try:
        job.file.check(report)
    except AssertionError:
        return True
    return False


def summary(jobs: list[Job], triton: str, commit: str) -> list[dict]:
    """A row of RECORD for every kernel, dtype and architecture, from the reports that exist.

    wgmma: "yes" if every configuration has Hopper's matrix instruction, "some" or "no"; empty except for sm_90.
    """
    groups: dict[tuple, list[Job]] = {}
    for job in jobs:
        groups.setdefault((job.launch.kernel.fn.__name__, job.dtype, job.arch), []).append(job)
    rows = []
    for (kernel, dtype, arch), group in sorted(groups.items()):
        found = [(job, report) for job in group if (report := known(job)) is not None]
        hopper = {bool(report["wgmma"]) for _, report in found} if arch == 90 else set()
        values = [
            triton, commit, kernel.strip("_"), dtype, f"sm_{arch}", len(group), len(found),
            sum(fails(*pair) for pair in found), *(max((r[k] for _, r in found), default="") for k in
            ("registers", "shared", "spills")), "" if not hopper else "some" if len(hopper) == 2 else
            "yes" if hopper == {True} else "no",
        ]  # fmt: skip
        rows.append(dict(zip(RECORD, values)))
    return rows


def _write_record(jobs: list[Job]) -> pathlib.Path:
    import triton

    git = ["git", "-C", str(ROOT), "log", "-1", "--format=%h", "--", "kernels", "transformer_fast/backends"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    path = ROOT / "benchmarks" / "results" / "ahead-of-time" / f"triton-{triton.__version__}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    before = list(csv.DictReader(path.open(newline=""))) if path.exists() else []
    rows = merged(before, summary(jobs, triton.__version__, commit))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, RECORD, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def merged(before: list[dict], rows: list[dict]) -> list[dict]:
    """The record with the rows of this run, and its commit, in place of older rows of the same kernels. Kernels that
    this run did not compile keep their rows and commits."""

    def place(row: dict) -> tuple:
        return row["kernel"], row["dtype"], int(row["arch"].removeprefix("sm_"))

    found = {place(row): row for row in before}
    found |= {place(row): row for row in rows if row["compiled"] or place(row) not in found}
    return [found[key] for key in sorted(found)]


def _load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", help="test files with cases(arch, scope) and check(report); default: all")
    parser.add_argument("--arch", nargs="+", type=int, choices=ARCHS, default=list(ARCHS), help="default: all")
    parser.add_argument("--every-combination", action="store_true", help='the scope "every": days')
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--kernels", default="", help="kernels whose name holds this regular expression")
    parser.add_argument("--processes", type=int, default=PROCESSES)
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="stop then (0: compile nothing); what is there is kept"
    )
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/ahead-of-time")
    parser.add_argument("--json", action="store_true", help="the test run's cases, as JSON")
    return parser


def main() -> int:
    args = _parser().parse_args()
    # The kernels are imported as transformer_fast.kernels from the checkout of this file.
    sys.path.append(str(ROOT))
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    os.environ.setdefault("TRITON_CACHE_DIR", str(_folder()))
    files = args.files or sorted(map(str, ROOT.glob("tests/native/test_triton_*_aot.py")))
    scope = "test" if args.json else "every" if args.every_combination else "record"
    jobs = [
        job
        for file in map(_load, files)
        for arch in args.arch
        for job in _jobs(file, arch, scope, args.only, args.kernels)
    ]
    if args.json:
        found: dict[str, list[dict]] = {}
        for job, report in reports(jobs, args.processes):
            found.setdefault(job.case, []).append(report)
        print(json.dumps(found))
        return 0
    jobs = _spread(jobs)
    done, failed, end = 0, 0, time.monotonic() + args.minutes * 60
    for done, (job, report) in enumerate(reports(jobs, args.processes) if args.minutes else (), 1):
        print(f"{done}/{len(jobs)} {job.case}:", *(f"{k}={v}" for k, v in report.items()), flush=True)
        if fails(job, report):
            failed += 1
            print("  FAILED", flush=True)
        if time.monotonic() > end:
            break
    print(f"{done} of {len(jobs)} kernels, {failed} failed")
    if args.record:
        print(_write_record(jobs))
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
