"""Compiles csrc/cuda/*.cu with nvcc for the tests, each for one architecture, and reports the result.

Reports, and the objects of one architecture, are cached under build/ by the hash of the source, its headers and the
compiler.
"""

import fcntl
import functools
import hashlib
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import tempfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
ARCHS = ("80", "90a", "100", "120")
NVCC = os.environ.get("NVCC", "nvcc")
FLAGS = ["-std=c++17", "-O3", "-Xptxas", "-v", "--Werror", "all-warnings", "-Xcompiler", "-Wall,-fPIC"]
LINKED = "90a"  # the objects of this architecture are kept, with host code, and linked
needs_nvcc = pytest.mark.skipif(not shutil.which(NVCC), reason=f"{NVCC} is not on PATH")
CACHE = ROOT / "build" / "cuda-static"


def _closure(file: pathlib.Path, seen: dict[pathlib.Path, str]) -> dict[pathlib.Path, str]:
    """The file and all headers of this repository that it includes."""
    if file not in seen:
        seen[file] = file.read_text()
        for name in re.findall(r'#include "([^"]+)"', seen[file]):
            for folder in (file.parent, CSRC, CSRC / "cuda"):
                if (folder / name).exists():
                    _closure((folder / name).resolve(), seen)
                    break
    return seen


@functools.cache
def _nvcc_version() -> str:
    return subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout


def disassembler() -> str | None:
    found = shutil.which("nvdisasm")
    spec = importlib.util.find_spec("triton")  # Triton's package contains one
    if not found and spec and spec.origin:
        shipped = pathlib.Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
        found = str(shipped) if shipped.exists() else None
    return found


def _opcodes(tool: str, cubin: pathlib.Path) -> dict[str, dict[str, int]]:
    """How often each instruction occurs in each kernel."""
    sass = subprocess.run([tool, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    kernels: dict[str, dict[str, int]] = {}
    counts: dict[str, int] = {}
    for line in sass.splitlines():
        if section := re.match(r"\.text\.(\w+):", line):
            counts = kernels.setdefault(section[1], {})
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+ +)?([A-Z][\w.]*)", line):
            counts[found[1]] = counts.get(found[1], 0) + 1
    return kernels


def _key(name: str, arch: str) -> str:
    text = sorted(f"{path.relative_to(ROOT)}\n{code}" for path, code in _closure(CSRC / "cuda" / name, {}).items())
    key = hashlib.sha256("\n".join([*text, arch, *FLAGS, _nvcc_version(), str(disassembler())]).encode())
    return f"{name.removesuffix('.cu')}.{arch}.{key.hexdigest()[:16]}"


def object_of(name: str) -> pathlib.Path:
    return CACHE / f"{_key(name, LINKED)}.o"


@functools.cache
def _report(name: str, arch: str) -> dict:
    CACHE.mkdir(parents=True, exist_ok=True)
    cached = CACHE / f"{_key(name, arch)}.json"
    with open(cached.with_suffix(".lock"), "w") as lock:  # two tests may compile it at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not cached.exists():
            report = _compile(name, arch)
            fresh = cached.with_suffix(".new")
            fresh.write_text(json.dumps(report))
            fresh.replace(cached)
    return json.loads(cached.read_text())


def _compile(name: str, arch: str) -> dict:
    source = CSRC / "cuda" / name
    with tempfile.TemporaryDirectory() as folder:
        cubin = pathlib.Path(folder) / "kernels.cubin"
        command = [NVCC, *FLAGS, f"-arch=sm_{arch}", f"-I{CSRC}", f"-I{CSRC}/cuda", str(source)]
        if arch == LINKED:
            command += ["--keep", "--keep-dir", folder, "-c", "-o", str(object_of(name))]
        else:
            command += ["-cubin", "-o", str(cubin)]
        result = subprocess.run(command, capture_output=True, text=True)
        log = result.stdout + result.stderr
        report = {"ok": result.returncode == 0, "log": log, "kernels": {}, "opcodes": None}
        if not report["ok"]:
            return report
        entries = re.split(r"Compiling entry function '(\w+)'", log)
        for kernel, said in zip(entries[1::2], entries[2::2]):
            report["kernels"][kernel] = {
                "registers": int(re.search(r"Used (\d+) registers", said)[1]),
                "stack": int(re.search(r"(\d+) bytes stack frame", said)[1]),
                "spills": sum(map(int, re.findall(r"(\d+) bytes spill", said))),
            }
        if disassembler():
            if arch == LINKED:
                cubin = next(pathlib.Path(folder).glob("*.cubin"))
            report["opcodes"] = _opcodes(disassembler(), cubin)
    return report


def compiled(name: str, arch: str) -> dict:
    report = _report(name, arch)
    assert report["ok"], report["log"][-4000:]
    return report
