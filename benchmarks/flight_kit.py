"""Makes the files that a GPU machine needs, on a machine without a GPU: bash benchmarks/gpu.sh pack

build/flight-kit: the library with code for sm_90a, Python packages that may be missing there, and the commit. Triton
kernels are compiled on the GPU machine, on all cores: Triton's cache is keyed by the bytes of the installed Triton,
which may differ there.
"""

import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
ARCHITECTURE = "90a"
PACKAGES = (
    "hypothesis",
    "sortedcontainers",
    "liger_kernel",
)  # pure Python; liger_kernel: a peer
LARGEST = 64 << 20  # bytes of the kit


def make(kit: pathlib.Path) -> int:
    kit = ROOT / kit
    kit.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "TRANSFORMER_FAST_CUDA_ARCHS": ARCHITECTURE, "TRANSFORMER_FAST_NATIVE": "1"}
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], check=True, env=environment, cwd=ROOT)
    shutil.copy2(ROOT / "transformer_fast" / "_C.abi3.so", kit)
    name = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    (kit / "commit").write_text(name.stdout)
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            print(f"not installed, left out: {package}")
            continue
        target = kit / "packages" / package / package
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(
            spec.submodule_search_locations[0], target, ignore=shutil.ignore_patterns("__pycache__", "*.so")
        )
    size = sum(path.stat().st_size for path in kit.rglob("*") if path.is_file())
    print(
        f"{kit.relative_to(ROOT)}: {size / 2**20:.1f} MiB of {LARGEST >> 20}. Copy it together with the tracked files;"
    )
    print("there: bash benchmarks/gpu.sh first; bash benchmarks/gpu.sh second; bash benchmarks/gpu.sh tune")
    return int(size > LARGEST)
