"""Runs the CUDA kernels (csrc/cuda) on CPU tensors under the emulator in tests/native/emulator, without a GPU.

The library is compiled once with g++ and ninja, into build/, from all of csrc/cuda/*.cu and csrc/bindings/cuda*.cpp. It
registers the ops transformer_fast::cuda_* for CPU tensors.
"""

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCES = ROOT / "tests" / "native" / "emulator"
CSRC = ROOT / "csrc"
NAME = "cuda_emulator_library"


def why_not() -> str:
    """What is missing on this machine to build the emulator; '' if it can be built."""
    missing = [m for m in ("pybind11", "ninja") if importlib.util.find_spec(m) is None]
    if missing:
        return f"{' and '.join(missing)} not installed (pip install {' '.join(missing)})"
    compiler = os.environ.get("CXX", "g++")
    return "" if shutil.which(compiler) else f"no C++ compiler ({compiler})"


@functools.cache
def library():
    """The emulator's controls: settings, counters(), reset_counters(), and kernels that test the emulator."""
    from transformer_fast.backends import native

    if why_not():
        pytest.skip(f"the CUDA emulator cannot be built: {why_not()}")
    reason = native.load()  # the native library has the schemas
    if reason:
        pytest.skip(f"the CUDA emulator needs the native library: {reason}")
    spec = importlib.util.spec_from_file_location(NAME, _build())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def active(late: bool = True, seed: int = 0, compute_capability: int = 90) -> Iterator[None]:
    """In this context `backend("cuda")` accepts CPU tensors. Skips the test if the emulator cannot be built.

    late: asynchronous copies and matrix products complete as late as allowed, else at once. seed: determines the order
    in which warps run. compute_capability: what the host code sees: 80, 90, 100 or 120.
    """
    from transformer_fast import backends
    from transformer_fast.backends import remembered

    settings = library().settings
    names = ("late", "seed", "compute_capability")
    before = [getattr(settings, name) for name in names]
    settings.late, settings.seed, settings.compute_capability = late, seed, compute_capability
    variable = os.environ.get("TRANSFORMER_FAST_CUDA_EMULATOR")
    os.environ["TRANSFORMER_FAST_CUDA_EMULATOR"] = "1"
    try:
        yield
    finally:
        for name, value in zip(names, before):
            setattr(settings, name, value)
        if variable is None:
            del os.environ["TRANSFORMER_FAST_CUDA_EMULATOR"]
        else:
            os.environ["TRANSFORMER_FAST_CUDA_EMULATOR"] = variable
        backends._select.cache_clear()  # selections in this context do not hold outside
        remembered.forget()


def _flags() -> list[str]:
    import pybind11
    import torch

    includes = [CSRC, CSRC / "cuda", CSRC / "bindings", SOURCES, sysconfig.get_paths()["include"],
                pybind11.get_include(), pathlib.Path(torch.__file__).parent / "include"]  # fmt: skip
    native = ["-march=native"] if platform.machine() in ("x86_64", "AMD64") else []
    return ["-std=gnu++17", "-O2", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", *native,
            "-DTF_EMULATE", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-Wall", "-Wno-unknown-pragmas",
            "-Wno-attributes", "-Wno-psabi", *(f"-I{i}" for i in includes)]  # fmt: skip


def _build() -> pathlib.Path:
    """Compile what has changed. Several processes (pytest-xdist) may call this at once; one of them compiles."""
    import torch

    compiler = os.environ.get("CXX", "g++")
    flags = _flags()
    machine = subprocess.run([compiler, "-march=native", "-Q", "--help=target"], capture_output=True, text=True).stdout
    key = hashlib.sha256("\n".join([compiler, *flags, sys.version, torch.__version__, machine]).encode())
    build = ROOT / "build" / f"cuda-emulator-{key.hexdigest()[:12]}"
    build.mkdir(parents=True, exist_ok=True)
    target = build / f"{NAME}.so"
    with open(build / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _write_ninja(build, target, compiler, flags)
        result = subprocess.run(
            [sys.executable, "-m", "ninja", "-C", str(build)], capture_output=True, text=True, env=_environment()
        )
    assert result.returncode == 0, (
        f"the CUDA emulator does not compile:\n{result.stdout[-8000:]}{result.stderr[-2000:]}"
    )
    return target


def _environment() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C"}


def _write_ninja(build: pathlib.Path, target: pathlib.Path, compiler: str, flags: list[str]) -> None:
    import torch

    sources = [*SOURCES.glob("*.cpp"), *(CSRC / "cuda").glob("*.cu"), *(CSRC / "bindings").glob("cuda*.cpp")]
    lib = pathlib.Path(torch.__file__).parent / "lib"
    lines = [
        f"flags = {' '.join(flags)}",
        "rule cc",
        f"  command = {compiler} $flags -MMD -MF $out.d -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule ld",
        f"  command = {compiler} -shared -o $out $in -L{lib} -ltorch -ltorch_cpu -lc10",
    ]
    objects = []
    for source in sorted(sources):
        objects.append(f"{source.parent.name}.{source.stem}.o")
        lines.append(f"build {objects[-1]}: cc {source}")
    lines += [f"build {target.name}: ld {' '.join(objects)}", ""]
    text = "\n".join(lines)
    file = build / "build.ninja"
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
