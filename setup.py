"""Builds transformer_fast/_C.abi3.so: CPU kernels once per instruction set, CUDA kernels where nvcc is.

Everything degrades: no compiler, no torch at build time or no nvcc leaves that part out, and
`transformer-fast info` says so. Set TRANSFORMER_FAST_REQUIRE_NATIVE=1 to make a failed build an error.
"""

import os
import pathlib
import platform
import runpy
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
SOURCE_HASH = runpy.run_path(str(ROOT / "transformer_fast/backends/source_hash.py"))["source_hash"](ROOT)
CPU_FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
X86_ISAS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512cd", "-mavx2", "-mfma", "-mf16c",
               "-mprefer-vector-width=512"],
}  # fmt: skip
X86_ISAS["avx512_bf16"] = [*X86_ISAS["avx512"], "-mavx512bf16"]


def isas() -> dict[str, list[str]]:
    return X86_ISAS if platform.machine() in ("x86_64", "AMD64") else {"baseline": []}


def torch_paths() -> tuple[list[str], str]:
    """Include folders and library folder of the torch that is installed here."""
    import torch

    base = pathlib.Path(torch.__file__).parent
    return [str(base / "include")], str(base / "lib")


class Plan:
    """Object files to compile (source, flags, object) and the link line."""

    def __init__(self, build: pathlib.Path, output: pathlib.Path):
        self.build, self.output = build, output
        self.cxx = os.environ.get("CXX", "g++")
        includes, self.torch_lib = torch_paths()
        includes = [*includes, sysconfig.get_paths()["include"], str(CSRC)]
        common = ["-std=gnu++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi",
                  "-Wno-unused-parameter"]  # fmt: skip
        isa_list = "#define TF_ISA_LIST(X) " + " ".join(f"X({name})" for name in isas()) + "\n"
        build.mkdir(parents=True, exist_ok=True)
        config = build / "isa_list.h"
        if not config.exists() or config.read_text() != isa_list:
            config.write_text(isa_list)
        binding = [*common, "-O2", "-include", str(config), "-DTORCH_TARGET_VERSION=0x020b000000000000",
                   "-DPy_LIMITED_API=0x030a0000", *(f"-I{i}" for i in includes)]  # fmt: skip
        self.objects: list[tuple[list[str], pathlib.Path, pathlib.Path]] = []
        for source in sorted([*CSRC.glob("*.cpp"), *CSRC.glob("bindings/*.cpp")]):
            stamp = [f"-DTF_SOURCE_HASH={SOURCE_HASH}"] if source.name == "ops.cpp" else []
            self.add(source, [self.cxx, *binding, *stamp], f"binding.{source.stem}")
        for name, flags in isas().items():
            for source in sorted((CSRC / "cpu").glob("*.cpp")):
                self.add(source, [self.cxx, *common, *CPU_FLAGS, f"-DTF_ISA={name}", *flags, f"-I{CSRC}"],
                         f"{name}.{source.stem}")  # fmt: skip

    def add(self, source: pathlib.Path, command: list[str], stem: str) -> None:
        self.objects.append((command, source, self.build / f"{stem}.o"))

    def link(self) -> list[str]:
        return [self.cxx, "-shared", "-o", str(self.output), *(str(o) for _, _, o in self.objects),
                f"-L{self.torch_lib}", "-ltorch", "-ltorch_cpu", "-lc10", "-Wl,--as-needed"]  # fmt: skip

    def run(self) -> None:
        ninja = ninja_command()
        if ninja:
            lines = ["rule cc", "  command = $cmd -MMD -MF $out.d -c $in -o $out", "  depfile = $out.d",
                     "  deps = gcc", "rule ld", "  command = $cmd"]  # fmt: skip
            for command, source, out in self.objects:
                lines += [f"build {out}: cc {source}", f"  cmd = {' '.join(command)}"]
            lines += [f"build {self.output}: ld {' '.join(str(o) for _, _, o in self.objects)}",
                      f"  cmd = {' '.join(self.link())}", ""]  # fmt: skip
            (self.build / "build.ninja").write_text("\n".join(lines))
            subprocess.run([*ninja, "-C", str(self.build)], check=True)
            return
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda o: subprocess.run([*o[0], "-c", str(o[1]), "-o", str(o[2])], check=True),
                          self.objects))  # fmt: skip
        subprocess.run(self.link(), check=True)


def ninja_command() -> list[str] | None:
    if shutil.which("ninja"):
        return ["ninja"]
    probe = subprocess.run([sys.executable, "-m", "ninja", "--version"], capture_output=True)
    return [sys.executable, "-m", "ninja"] if probe.returncode == 0 else None


class BuildNative(build_ext):
    def build_extension(self, ext: Extension) -> None:
        output = pathlib.Path(self.get_ext_fullpath(ext.name)).resolve()
        output = output.with_name("_C.abi3.so")
        output.parent.mkdir(parents=True, exist_ok=True)
        output.unlink(missing_ok=True)  # never ship an older build when this one fails
        build = ROOT / "build" / f"native-{platform.machine()}"
        try:
            plan = Plan(build, build / "_C.abi3.so")
            plan.run()
            shutil.copy2(plan.output, output)
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            if os.environ.get("TRANSFORMER_FAST_REQUIRE_NATIVE") == "1":
                raise
            print(f"transformer_fast: built without its native library ({error}); "
                  "plain PyTorch will be used on the CPU", file=sys.stderr)  # fmt: skip

    def get_outputs(self) -> list[str]:
        return [p for p in super().get_outputs() if pathlib.Path(p).exists()]

    def copy_extensions_to_source(self) -> None:
        built = pathlib.Path(self.build_lib) / "transformer_fast" / "_C.abi3.so"
        if built.exists():
            # A new file in its place: writing into the old one would crash processes that have it loaded.
            copy = ROOT / "transformer_fast" / "_C.abi3.so.new"
            shutil.copy2(built, copy)
            copy.replace(copy.with_suffix(""))


setup(
    ext_modules=[Extension("transformer_fast._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
