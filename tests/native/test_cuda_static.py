"""Checks what nvcc makes of the CUDA kernels, without a GPU: no warnings, no spills, the intended instructions.

Every csrc/cuda/*.cu is compiled for each architecture that it is shipped for.
"""

import os
import pathlib
import re
import subprocess
import sys

import pytest
from cuda_objects import ARCHS, CSRC, LINKED, NVCC, SOURCES, compiled, needs_nvcc, object_of

HOST_ONLY = ("stream.cu",)
JOBS = [(source.name, arch) for source in SOURCES for arch in ARCHS if "_wgmma" not in source.name or arch == "90a"]
JOBS = [job for job in JOBS if job[0] not in HOST_ONLY]


def _has(counts: dict[str, int], pattern: str) -> bool:
    return any(re.match(pattern, opcode) for opcode in counts)


@needs_nvcc
@pytest.mark.parametrize("name, arch", JOBS)
def test_compiles_within_its_registers(name, arch):
    report = compiled(name, arch)
    assert report["kernels"], "no kernels"
    # ptxas prints this if it has to serialise wgmma or ignores setmaxnreg.
    assert "Potential Performance Loss" not in report["log"], report["log"][-4000:]
    for kernel, use in report["kernels"].items():
        assert use["spills"] == 0 and use["stack"] == 0, (kernel, use)
        assert use["registers"] <= 255, (kernel, use)


def _instructions(name: str, arch: str) -> dict[str, dict[str, int]]:
    report = compiled(name, arch)
    if report["opcodes"] is None:
        pytest.skip("no nvdisasm: neither on PATH nor in Triton's package")
    return report["opcodes"]


# The kernels with matrix products. Other kernels in the same files prepare or finish their work.
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
    """Bindings, launchers and kernels are linked as in setup.py, and torch then finds the ops under the CUDA key."""
    import torch

    torch_folder = pathlib.Path(torch.__file__).parent
    cxx = os.environ.get("CXX", "g++")
    for source in SOURCES:
        compiled(source.name, LINKED)
    bindings = sorted((CSRC / "bindings").glob("cuda_*.cpp"))
    define = ["-DTORCH_TARGET_VERSION=0x020b000000000000", f'-DTF_WITH_CUDA="{LINKED}"']
    compile_one = [cxx, "-std=gnu++17", "-O0", "-fPIC", "-fvisibility=hidden", *define, f"-I{CSRC}"]
    for source in bindings:
        command = [*compile_one, f"-I{torch_folder}/include", "-c", str(source), "-o", f"{tmp_path}/{source.stem}.o"]
        subprocess.run(command, check=True)
    objects = [*tmp_path.glob("*.o"), *(object_of(source.name) for source in SOURCES)]
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
