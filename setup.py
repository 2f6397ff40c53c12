"""Builds transformer_fast/_C.abi3.so: CPU kernels once per instruction set, and CUDA kernels if there is nvcc.

The library is built against the torch that the package will run with. Under pip's build isolation, torch is searched in
the environment that pip installs into. If it is not found, the build stops with the command that works. Without a C++
compiler the library is left out, and without nvcc the CUDA kernels are. The reason is written to
transformer_fast/_native_missing.txt, and `transformer-fast info` and the first slow call show it. A wheel without the
library is a pure Python wheel. TRANSFORMER_FAST_NATIVE=0 leaves the library out, TRANSFORMER_FAST_NATIVE=1 makes a
failed build an error.

CUDA code is compiled for the GPUs that torch sees here, so for none on a machine without a GPU.
TRANSFORMER_FAST_CUDA_ARCHS selects others: "all", "none", or a list of 80, 90a, 100, 120.
"""

import functools
import json
import os
import pathlib
import platform
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
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
# The architecture for GPUs of compute capability 8.x, 9.x, ... Files with _wgmma in their names are for sm_90a only.
CUDA_ARCHS = {8: "80", 9: "90a", 10: "100", 12: "120"}
LIBRARY, NOTE = "_C.abi3.so", "_native_missing.txt"
CUDA_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"]
X86_ISAS["avx512_bf16"] = [*X86_ISAS["avx512"], "-mavx512bf16"]
X86_ISAS["avx512_amx"] = [*X86_ISAS["avx512_bf16"], "-mamx-tile", "-mamx-bf16"]
# For files with int8 in their names: more instruction sets, with byte multiplications.
X86_INT8_ISAS = {
    "baseline": X86_ISAS["baseline"],
    "avx2": X86_ISAS["avx2"],
    "avx_vnni": [*X86_ISAS["avx2"], "-mavxvnni"],
    "avx512": X86_ISAS["avx512"],
    "avx512_vnni": [*X86_ISAS["avx512"], "-mavx512vnni"],
    "avx512_amx": [*X86_ISAS["avx512"], "-mavx512vnni", "-mamx-tile", "-mamx-int8"],
}
OLDEST_TORCH = (2, 11)
NO_TORCH = """
transformer_fast's CPU library is built against your torch, and this build sees none{where}. The command that works:

    pip install torch && pip install {what}

(uv and `python -m build` hide an installed torch from builds. With them: --no-build-isolation, or --no-isolation, after
pip install "setuptools>=77" wheel ninja. TRANSFORMER_FAST_NATIVE=0 installs without the library, slow on CPUs.)
"""


class Torch(NamedTuple):
    """The torch to build against. visible_majors: the major compute capabilities of the GPUs that it sees (9 for
    9.0)."""

    folder: str
    version: str
    visible_majors: list[int]


_ASK_TORCH = """
import json, os, torch
n = torch.cuda.device_count() if torch.cuda.is_available() else 0
majors = sorted({torch.cuda.get_device_capability(i)[0] for i in range(n)})
print(json.dumps([os.path.dirname(torch.__file__), torch.__version__, majors]))
"""


@functools.cache
def find_torch() -> Torch:
    """Find torch in the current environment, then without PYTHONPATH, in the environment of the interpreter itself.

    pip's build isolation runs the interpreter that it installs for with a PYTHONPATH of isolated packages. Without that
    variable the interpreter sees its own torch. Raises SystemExit, which installers pass on, if there is no torch.
    """
    errors = []
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for environment in (os.environ, bare):
        done = subprocess.run([sys.executable, "-c", _ASK_TORCH], capture_output=True, text=True, env=environment)
        if done.returncode == 0:
            found = Torch(*json.loads(done.stdout.splitlines()[-1]))
            if tuple(int(n) for n in found.version.split(".")[:2]) < OLDEST_TORCH:
                raise SystemExit(
                    f"transformer_fast needs torch >= 2.11, and {found.folder} is torch {found.version}: "
                    "pip install --upgrade torch"
                )
            return found
        errors.append((done.stderr.strip().splitlines() or ["no output"])[-1])
    broken = [error for error in errors if "No module named 'torch'" not in error]
    where = f" that can be imported ({broken[-1]})" if broken else ""
    temporary = ROOT.name.startswith(("pip-", "sdist-", "tmp"))  # pip's own copy of the sources
    raise SystemExit(NO_TORCH.format(where=where, what="(what you gave to pip)" if temporary else ROOT))


def isas(int8: bool = False) -> dict[str, list[str]]:
    """The instruction sets to compile for, with their flags: those that the compiler knows."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return {"baseline": []}
    known = {name: flags for name, flags in X86_ISAS.items() if compiler_knows(tuple(flags))}
    if not int8:
        return known
    int8_isas = {name: flags for name, flags in X86_INT8_ISAS.items() if compiler_knows(tuple(flags))}
    if "avx512_amx" not in known:  # those who choose it choose both
        int8_isas.pop("avx512_amx", None)
    return int8_isas


def compiler_command() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or ["g++"]


@functools.cache
def compiler_knows(flags: tuple[str, ...]) -> bool:
    command = [*compiler_command(), *flags, "-x", "c++", "-fsyntax-only", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[0]
        print(f"transformer_fast: built without an instruction set that the compiler lacks: {reason}", file=sys.stderr)
    return done.returncode == 0


def cuda_archs() -> list[str]:
    """The architectures to compile CUDA code for; empty if there is nothing to compile."""
    asked = os.environ.get("TRANSFORMER_FAST_CUDA_ARCHS", "").strip()
    if asked == "none":
        return []
    if not list((CSRC / "cuda").glob("*.cu")):
        return []
    known = list(CUDA_ARCHS.values())
    if asked:
        archs = known if asked == "all" else asked.replace(",", " ").split()
        unknown = [a for a in archs if a not in known]
        if unknown:
            raise ValueError(f"TRANSFORMER_FAST_CUDA_ARCHS: {', '.join(unknown)} unknown; wanted {', '.join(known)}")
    else:
        archs = visible_archs()
    if archs and not shutil.which(nvcc()):
        if asked and required():
            raise OSError(f"TRANSFORMER_FAST_CUDA_ARCHS={asked} needs {nvcc()}, which is not on PATH")
        print(f"transformer_fast: no {nvcc()} on PATH, built without CUDA kernels", file=sys.stderr)
        return []
    return archs


def visible_archs() -> list[str]:
    return [CUDA_ARCHS[major] for major in find_torch().visible_majors if major in CUDA_ARCHS]


def required() -> bool:
    return os.environ.get("TRANSFORMER_FAST_NATIVE") == "1"


def nvcc() -> str:
    return os.environ.get("NVCC", "nvcc")


def gencode(source: pathlib.Path, archs: list[str]) -> list[str]:
    if "_wgmma" in source.stem:  # its kernels are empty on other architectures; only the host code is needed there
        archs = ["90a"] if "90a" in archs else archs[:1]
    return [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]


class Plan:
    """Object files to compile (source, flags, object) and the link line."""

    def __init__(self, build: pathlib.Path, output: pathlib.Path, archs: list[str]):
        self.build, self.output, self.archs = build, output, archs
        self.cxx = compiler_command()
        torch = pathlib.Path(find_torch().folder)
        self.torch_lib = torch / "lib"
        includes = [str(torch / "include"), sysconfig.get_paths()["include"], str(CSRC)]
        common = ["-std=gnu++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi",
                  "-Wno-unused-parameter"]  # fmt: skip
        isa_list = "".join(
            f"#define {macro}(X) {' '.join(f'X({name})' for name in isas(int8))}\n"
            for macro, int8 in (("TF_ISA_LIST", False), ("TF_INT8_ISA_LIST", True))
        )
        build.mkdir(parents=True, exist_ok=True)
        config = build / "isa_list.h"
        cuda_archs = f'#define TF_WITH_CUDA "{" ".join(archs)}"\n'
        for file, text in ((config, isa_list), (build / "cuda_archs.h", cuda_archs)):
            if not file.exists() or file.read_text() != text:
                file.write_text(text)
        binding = [*common, "-O2", "-include", str(config), "-DTORCH_TARGET_VERSION=0x020b000000000000",
                   "-DPy_LIMITED_API=0x030a0000", *(f"-I{i}" for i in includes)]  # fmt: skip
        self.objects: list[tuple[list[str], pathlib.Path, pathlib.Path]] = []
        for source in sorted([*CSRC.glob("*.cpp"), *CSRC.glob("bindings/*.cpp")]):
            cuda = archs and (source.stem == "ops" or source.stem.startswith("cuda_"))
            extra = ["-include", str(build / "cuda_archs.h")] if cuda else []
            if source.name == "ops.cpp":
                extra.append(f"-DTF_SOURCE_HASH={SOURCE_HASH}")
            self.add(source, [*self.cxx, *binding, *extra], f"binding.{source.stem}")
        for source in sorted((CSRC / "cpu").glob("*.cpp")):
            for name, flags in isas("int8" in source.stem).items():
                self.add(source, [*self.cxx, *common, *CPU_FLAGS, f"-DTF_ISA={name}", *flags, f"-I{CSRC}"],
                         f"{name}.{source.stem}")  # fmt: skip
        for source in sorted((CSRC / "cuda").glob("*.cu")) if archs else []:
            self.add(source, [nvcc(), *CUDA_FLAGS, *gencode(source, archs), f"-I{CSRC}", f"-I{CSRC}/cuda"],
                     f"cuda.{source.stem}")  # fmt: skip

    def add(self, source: pathlib.Path, command: list[str], stem: str) -> None:
        self.objects.append((command, source, self.build / f"{stem}.o"))

    def link(self) -> list[str]:
        # CUDA's runtime is linked statically and the driver is found at run time, so the library loads without CUDA.
        linker = [nvcc(), "-ccbin", self.cxx[-1], "-cudart", "static", "-Xlinker", "--exclude-libs=ALL"]
        return [*(linker if self.archs else self.cxx), "-shared", "-o", str(self.output),
                *(str(o) for _, _, o in self.objects),
                f"-L{self.torch_lib}", "-ltorch", "-ltorch_cpu", "-lc10"]  # fmt: skip

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


def without_library() -> str:
    """Why the library cannot be built, as a sentence for users; '' if it can."""
    if os.environ.get("TRANSFORMER_FAST_NATIVE") == "0":
        return "transformer_fast was installed with TRANSFORMER_FAST_NATIVE=0"
    compiler = compiler_command()[0]
    if not shutil.which(compiler):
        return (
            f"there was no C++ compiler ({compiler}) when transformer_fast was installed; get one "
            "(apt-get install g++, dnf install gcc-c++) and install transformer_fast again"
        )
    header = pathlib.Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.exists():
        return (
            f"Python's headers ({header}) were missing when transformer_fast was installed; get them "
            "(apt-get install python3-dev, dnf install python3-devel) and install transformer_fast again"
        )
    return ""


def failure(error: Exception) -> str:
    """Why the build failed, as a sentence for users."""
    return (
        f"its build failed when transformer_fast was installed ({error}); to see why, build again with "
        "TRANSFORMER_FAST_NATIVE=1"
    )


class BuildNative(build_ext):
    def build_extension(self, ext: Extension) -> None:
        output = pathlib.Path(self.get_ext_fullpath(ext.name)).resolve()
        output = output.with_name(LIBRARY)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.unlink(missing_ok=True)  # do not ship an older build if this one fails
        reason = without_library()
        if reason and required():
            raise SystemExit(f"TRANSFORMER_FAST_NATIVE=1, but {reason}")
        if not reason:
            find_torch()
            try:
                shutil.copy2(self.build_library(), output)
            except (OSError, subprocess.CalledProcessError) as error:
                if required():
                    raise
                reason = failure(error)
        note = output.with_name(NOTE)
        note.unlink(missing_ok=True)
        if reason:
            print(f"transformer_fast: built without its CPU library: {reason}", file=sys.stderr)
            note.write_text(reason + "\n")

    def build_library(self) -> pathlib.Path:
        build = ROOT / "build" / f"native-{platform.machine()}"
        plan = Plan(build, build / LIBRARY, cuda_archs())
        try:
            plan.run()
        except subprocess.CalledProcessError as error:
            if not plan.archs or required():
                raise
            print(f"transformer_fast: built without CUDA kernels ({error})", file=sys.stderr)
            plan = Plan(build, build / LIBRARY, [])
            plan.run()
        return plan.output

    def get_outputs(self) -> list[str]:
        made = [p for p in super().get_outputs() if pathlib.Path(p).exists()]
        note = pathlib.Path(self.build_lib) / "transformer_fast" / NOTE
        return [*made, *([str(note)] if note.exists() else [])]

    def copy_extensions_to_source(self) -> None:
        for name in (LIBRARY, NOTE):
            built, here = pathlib.Path(self.build_lib) / "transformer_fast" / name, ROOT / "transformer_fast" / name
            if built.exists():
                # Replace the file: writing into it would crash processes that have it loaded.
                copy = here.with_name(f"{name}.new")
                shutil.copy2(built, copy)
                copy.replace(here)
            elif name == NOTE:
                here.unlink(missing_ok=True)


class PureWithoutLibrary(bdist_wheel):
    """Tags a wheel without the library as pure, and one with it for this platform and CPython's stable ABI."""

    def run(self) -> None:
        self.run_command("build")
        if not (pathlib.Path(self.get_finalized_command("build").build_lib) / "transformer_fast" / LIBRARY).exists():
            self.distribution.ext_modules = None
            self.root_is_pure, self.py_limited_api = True, False
        super().run()


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("transformer_fast._C", sources=[], py_limited_api=True)],
        cmdclass={"build_ext": BuildNative, "bdist_wheel": PureWithoutLibrary},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
