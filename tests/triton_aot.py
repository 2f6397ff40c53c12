"""Compiles Triton kernels for GPUs that are not here, and reports what the compiler made of them.

A test file lists its launches in `cases(arch, everything)`: names and functions that call a launcher of kernels/
on meta tensors; without `everything`, as many as a test run has time for. `aot_reports` compiles them in a process
of its own, as Triton interprets in pytest's. By hand, under any Triton, everything:

    python tests/triton_aot.py tests/native/test_triton_layer_norm_aot.py 80 90 100 120

prints a line for each kernel of every case, and stops at one that fails the file's `check`.
"""

import contextlib
import importlib.util
import json
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


def reports(cases: dict[str, Callable[[], None]], arch: int) -> dict[str, list[dict]]:
    """Case name -> a report for each kernel that it launches first; the same kernel is compiled once."""
    found: dict[str, list[dict]] = {}
    seen = set()
    for name, call in cases.items():
        with recorded() as launches:
            call()
        found[name] = []
        for launch in launches:
            source, options = _source(launch)
            key = source.hash(), str(options)
            if key not in seen:
                seen.add(key)
                found[name].append(aot_report(launch, arch))
    return found


def aot_reports(file: str, arch: int) -> dict[str, list[dict]]:
    """`reports` of the cases of a test file, compiled in another process."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, file, str(arch), "--json"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout)


def main(file: str, archs: list[int], as_json: bool) -> None:
    # Kernels import as transformer_fast.kernels from the checkout this file is in.
    sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    os.environ.setdefault("TRITON_CACHE_DIR", str(pathlib.Path(tempfile.gettempdir()) / "transformer_fast_aot"))
    spec = importlib.util.spec_from_file_location("aot_cases", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for arch in archs:
        found = reports(module.cases(arch, everything=not as_json), arch)
        if as_json:
            print(json.dumps(found))
            continue
        for name, kernels in found.items():
            for report in kernels:
                print(name, *(f"{k}={v}" for k, v in report.items()), flush=True)
                module.check(report)


if __name__ == "__main__":
    flags = [a for a in sys.argv[1:] if a.startswith("-")]
    file, *archs = [a for a in sys.argv[1:] if not a.startswith("-")]
    main(file, [int(a) for a in archs] or list(ARCHS), "--json" in flags)
