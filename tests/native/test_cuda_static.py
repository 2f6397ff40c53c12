"""What nvcc makes of the CUDA kernels, where no GPU is: no warnings, no spills, the instructions they are written for.

Every csrc/cuda/*.cu is compiled for each architecture that it is shipped for; reports are kept under build/ by the hash
of the source, its headers and the compiler.
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
import sys
import tempfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
CSRC = ROOT / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
ARCHS = ("80", "90a", "100", "120")
NVCC = os.environ.get("NVCC", "nvcc")
FLAGS = ["-std=c++17", "-O3", "-Xptxas", "-v", "--Werror", "all-warnings", "-Xcompiler", "-Wall,-fPIC"]
LINKED = "90a"  # of this architecture the objects are kept, host code and all, and linked
CACHE = ROOT / "build" / "cuda-static"
HOST_ONLY = ("stream.cu",)
JOBS = [(source.name, arch) for source in SOURCES for arch in ARCHS if "_wgmma" not in source.name or arch == "90a"]
JOBS = [job for job in JOBS if job[0] not in HOST_ONLY]

needs_nvcc = pytest.mark.skipif(not shutil.which(NVCC), reason=f"{NVCC} is not on PATH")


def _closure(file: pathlib.Path, seen: dict[pathlib.Path, str]) -> dict[pathlib.Path, str]:
    """The file and every header of ours that it includes."""
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


def _disassembler() -> str | None:
    found = shutil.which("nvdisasm")
    spec = importlib.util.find_spec("triton")  # it ships one
    if not found and spec and spec.origin:
        shipped = pathlib.Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
        found = str(shipped) if shipped.exists() else None
    return found


def _opcodes(disassembler: str, cubin: pathlib.Path) -> dict[str, dict[str, int]]:
    """How often each instruction stands in each kernel."""
    sass = subprocess.run([disassembler, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
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
    key = hashlib.sha256("\n".join([*text, arch, *FLAGS, _nvcc_version(), str(_disassembler())]).encode())
    return f"{name.removesuffix('.cu')}.{arch}.{key.hexdigest()[:16]}"


def _object(name: str) -> pathlib.Path:
    return CACHE / f"{_key(name, LINKED)}.o"


@functools.cache
def _report(name: str, arch: str) -> dict:
    CACHE.mkdir(parents=True, exist_ok=True)
    cached = CACHE / f"{_key(name, arch)}.json"
    with open(cached.with_suffix(".lock"), "w") as lock:  # two tests may want it at once
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
            command += ["--keep", "--keep-dir", folder, "-c", "-o", str(_object(name))]
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
        if _disassembler():
            if arch == LINKED:
                cubin = next(pathlib.Path(folder).glob("*.cubin"))
            report["opcodes"] = _opcodes(_disassembler(), cubin)
    return report


def _compiled(name: str, arch: str) -> dict:
    report = _report(name, arch)
    assert report["ok"], report["log"][-4000:]
    return report


def _has(counts: dict[str, int], pattern: str) -> bool:
    return any(re.match(pattern, opcode) for opcode in counts)


@needs_nvcc
@pytest.mark.parametrize("name, arch", JOBS)
def test_compiles_within_its_registers(name, arch):
    report = _compiled(name, arch)
    assert report["kernels"], "no kernels"
    # ptxas's own words for wgmma that it had to serialise and for setmaxnreg that it ignores.
    assert "Potential Performance Loss" not in report["log"], report["log"][-4000:]
    for kernel, use in report["kernels"].items():
        assert use["spills"] == 0 and use["stack"] == 0, (kernel, use)
        assert use["registers"] <= 255, (kernel, use)


def _instructions(name: str, arch: str) -> dict[str, dict[str, int]]:
    report = _compiled(name, arch)
    if report["opcodes"] is None:
        pytest.skip("no nvdisasm: neither on PATH nor in Triton's package")
    return report["opcodes"]


# The kernels that multiply; others beside them prepare or finish their work.
@needs_nvcc
@pytest.mark.parametrize("name", [s.name for s in SOURCES if "_wgmma" in s.name])
def test_wgmma_and_tma(name):
    main = {k: c for k, c in _instructions(name, "90a").items() if _has(c, r"HGMMA")}
    assert main, "no kernel has wgmma"
    for kernel, counts in main.items():
        assert not _has(counts, r"HMMA"), kernel
        assert _has(counts, r"UTMALDG"), kernel
        assert _has(counts, r"USETMAXREG"), kernel


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", [s.name for s in SOURCES if "_mma" in s.stem])
def test_mma_and_cp_async(name, arch):
    main = {k: c for k, c in _instructions(name, arch).items() if _has(c, r"HMMA\.16816\.F32")}
    assert main, "no kernel has mma"
    for kernel, counts in main.items():
        assert _has(counts, r"LDGSTS\.E\S*\.128"), kernel
        assert _has(counts, r"LDSM"), kernel


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", [s.name for s in SOURCES if s.stem.startswith("norm")])
def test_norms_read_and_write_16_bytes(name, arch):
    opcodes = _instructions(name, arch)
    wide = [k for k, c in opcodes.items() if _has(c, r"LDG\.E\S*\.128") and _has(c, r"STG\.E\S*\.128")]
    assert wide, sorted(opcodes)


@needs_nvcc
def test_library_registers_and_loads_without_a_gpu(tmp_path):
    """Bindings, launchers and kernels linked as setup.py does: torch finds the ops under the CUDA key."""
    import torch

    torch_folder = pathlib.Path(torch.__file__).parent
    cxx = os.environ.get("CXX", "g++")
    for source in SOURCES:
        _compiled(source.name, LINKED)
    bindings = sorted((CSRC / "bindings").glob("cuda_*.cpp"))
    define = ["-DTORCH_TARGET_VERSION=0x020b000000000000", f'-DTF_WITH_CUDA="{LINKED}"']
    compile_one = [cxx, "-std=gnu++17", "-O0", "-fPIC", "-fvisibility=hidden", *define, f"-I{CSRC}"]
    for source in bindings:
        command = [*compile_one, f"-I{torch_folder}/include", "-c", str(source), "-o", f"{tmp_path}/{source.stem}.o"]
        subprocess.run(command, check=True)
    objects = [*tmp_path.glob("*.o"), *(_object(source.name) for source in SOURCES)]
    link = [NVCC, "-ccbin", cxx, "-cudart", "static", "-Xlinker", "--exclude-libs=ALL", "-shared", *map(str, objects)]
    library = tmp_path / "library.so"
    libraries = [f"-L{torch_folder}/lib", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run([*link, *libraries, "-o", str(library)], check=True)
    ops = sorted({op for source in bindings for op in re.findall(r'm\.impl\("(\w+)"', source.read_text())})
    assert ops
    check = (
        f"import torch; torch.ops.load_library({str(library)!r})\n"
        f"has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        f"print([op for op in {ops!r} if not has('transformer_fast::' + op, 'CUDA')])"
    )
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout.strip()) == (0, "[]"), result.stdout + result.stderr[-2000:]
