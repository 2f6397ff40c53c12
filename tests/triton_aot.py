"""Compiles Triton kernels for GPUs that are not here, and reports what the compiler made of them.

A test file lists its launches in `cases(arch, everything)`: names and functions that call a launcher of kernels/
on meta tensors; without `everything`, as many as a test run has time for. `aot_reports` compiles them in a process
of its own, as Triton interprets in pytest's. By hand, under any Triton, everything:

    python tests/triton_aot.py tests/native/test_triton_layer_norm_aot.py 80 90 100 120

prints a line for each kernel of every case, says which fail the file's `check`, and exits with 1 if any does.
`--only TEXT` takes the cases with TEXT in their names. Two processes compile; reports are kept in
$TRANSFORMER_FAST_AOT_CACHE (default: in the temporary folder) by the hash of kernel, types, options, GPU and Triton.
"""

import argparse
import contextlib
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
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

# Bytes of shared memory that one block may use.
SHARED_MEMORY = {80: 166912, 90: 232448, 100: 232448, 120: 101376}
ARCHS = tuple(SHARED_MEMORY)
PROCESSES = 2


class Launch(NamedTuple):
    kernel: Any
    args: tuple
    kwargs: dict


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Kernel launches inside are noted, not run."""
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []
    run = JITFunction.run
    JITFunction.run = lambda self, *args, grid, warmup, **kwargs: launches.append(Launch(self, args, kwargs))
    try:
        yield launches
    finally:
        JITFunction.run = run


def _source(launch: Launch):
    """What Triton's own launch would compile, and its options: types and alignments are read off the arguments."""
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
    """Registers a thread, spills, shared memory and the instructions that matter, read from the SASS."""
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
    """Fits the shared memory and the register file, spills nothing, stays within `registers` a thread."""
    assert report["shared"] <= SHARED_MEMORY[report["arch"]], report
    assert report["spills"] == 0, report
    assert report["registers"] <= registers, report
    assert report["registers"] * report["warps"] * 32 <= 65536, report


class Job(NamedTuple):
    """One kernel to compile. key: what its report depends on."""

    case: str
    launch: Launch
    arch: int
    key: str


def _jobs(cases: dict[str, Callable[[], None]], arch: int) -> Iterator[Job]:
    """The kernels that the cases launch, each once, under the first case that launches it."""
    import triton

    seen = set()
    for name, call in cases.items():
        with recorded() as launches:
            call()
        for launch in launches:
            source, options = _source(launch)
            text = " ".join([source.hash(), str(sorted(options.items())), str(arch), triton.__version__])
            key = hashlib.sha256(text.encode()).hexdigest()
            if key not in seen:
                seen.add(key)
                yield Job(name, launch, arch, key)


def _folder() -> pathlib.Path:
    default = pathlib.Path(tempfile.gettempdir()) / "transformer_fast_aot"
    return pathlib.Path(os.environ.get("TRANSFORMER_FAST_AOT_CACHE", default))


_pending: list[Job] = []  # forked workers find their jobs here: launches do not pickle


def _compile(index: int) -> dict:
    job = _pending[index]
    path = _folder() / "reports" / f"{job.key}.json"
    if path.exists():
        return json.loads(path.read_text())
    report = aot_report(job.launch, job.arch)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(f".{os.getpid()}")
    fresh.write_text(json.dumps(report))
    fresh.replace(path)
    return report


def reports(jobs: list[Job], processes: int) -> Iterator[tuple[Job, dict]]:
    """Each job with its report, in the order of the jobs."""
    _pending[:] = jobs
    if processes == 1:
        yield from zip(jobs, map(_compile, range(len(jobs))))
        return
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        yield from zip(jobs, pool.imap(_compile, range(len(jobs))))


def aot_reports(file: str, arch: int) -> dict[str, list[dict]]:
    """Case name -> reports of the test run's cases of a test file, compiled in another process."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, file, str(arch), "--json"]
    if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1:
        command.append("--processes=1")  # the workers fill the cores already
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="a test file with cases(arch, everything) and check(report)")
    parser.add_argument("archs", nargs="*", type=int, help="80, 90, 100, 120; default: all")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--processes", type=int, default=PROCESSES)
    parser.add_argument("--json", action="store_true", help="the test run's cases of one GPU, as JSON")
    return parser


def main() -> int:
    args = _parser().parse_args()
    # Kernels import as transformer_fast.kernels from the checkout this file is in.
    sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    os.environ.setdefault("TRITON_CACHE_DIR", str(_folder()))
    spec = importlib.util.spec_from_file_location("aot_cases", args.file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    jobs, names = [], {}
    for arch in args.archs or ARCHS:
        cases = module.cases(arch, everything=not args.json)
        cases = {name: call for name, call in cases.items() if args.only in name}
        names |= dict.fromkeys(cases)
        jobs += _jobs(cases, arch)
    if args.json:
        found: dict[str, list[dict]] = {name: [] for name in names}
        for job, report in reports(jobs, args.processes):
            found[job.case].append(report)
        print(json.dumps(found))
        return 0
    failed = 0
    for done, (job, report) in enumerate(reports(jobs, args.processes), 1):
        print(f"{done}/{len(jobs)} {job.case}:", *(f"{k}={v}" for k, v in report.items()), flush=True)
        try:
            module.check(report)
        except AssertionError:
            failed += 1
            print("  FAILED", flush=True)
    print(f"{len(jobs)} kernels, {failed} failed")
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
