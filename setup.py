"""Builds transformer_fast/_C.abi3.so: CPU kernels once per instruction set, CUDA kernels where nvcc is.

Everything degrades: no compiler, no torch at build time or no nvcc leaves that part out, and
`transformer-fast info` says so. Set TRANSFORMER_FAST_REQUIRE_NATIVE=1 to make a failed build an error.

CUDA code is compiled for the GPUs that torch sees here, so by default for none where there is no GPU.
TRANSFORMER_FAST_CUDA_ARCHS asks for others: "all", "none", or a list of 80, 90a, 100, 120.
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
# What a GPU of compute capability 8.x, 9.x, ... runs. Files with _wgmma in their names have code for sm_90a alone.
CUDA_ARCHS = {8: "80", 9: "90a", 10: "100", 12: "120"}
CUDA_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"]
X86_ISAS["avx512_bf16"] = [*X86_ISAS["avx512"], "-mavx512bf16"]
# Of the files with int8 in their names: more sets, with instructions that multiply bytes.
X86_INT8_ISAS = {
    "baseline": X86_ISAS["baseline"],
    "avx2": X86_ISAS["avx2"],
    "avx_vnni": [*X86_ISAS["avx2"], "-mavxvnni"],
    "avx512": X86_ISAS["avx512"],
    "avx512_vnni": [*X86_ISAS["avx512"], "-mavx512vnni"],
}


def isas(int8: bool = False) -> dict[str, list[str]]:
    if platform.machine() not in ("x86_64", "AMD64"):
        return {"baseline": []}
    return X86_INT8_ISAS if int8 else X86_ISAS


def cuda_archs() -> list[str]:
    """The architectures to compile CUDA code for; empty where there is nothing to compile."""
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
        if asked and os.environ.get("TRANSFORMER_FAST_REQUIRE_NATIVE") == "1":
            raise OSError(f"TRANSFORMER_FAST_CUDA_ARCHS={asked} needs {nvcc()}, which is not on PATH")
        print(f"transformer_fast: no {nvcc()} on PATH, built without CUDA kernels", file=sys.stderr)
        return []
    return archs


def visible_archs() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return []
    majors = {torch.cuda.get_device_capability(i)[0] for i in range(torch.cuda.device_count())}
    return [CUDA_ARCHS[major] for major in sorted(majors) if major in CUDA_ARCHS]


def nvcc() -> str:
    return os.environ.get("NVCC", "nvcc")


def gencode(source: pathlib.Path, archs: list[str]) -> list[str]:
    if "_wgmma" in source.stem:  # elsewhere its kernels are empty: their host code is there to say no
        archs = ["90a"] if "90a" in archs else archs[:1]
    return [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]


def torch_paths() -> tuple[list[str], str]:
    """Include folders and library folder of the torch that is installed here."""
    import torch

    base = pathlib.Path(torch.__file__).parent
    return [str(base / "include")], str(base / "lib")


class Plan:
    """Object files to compile (source, flags, object) and the link line."""

    def __init__(self, build: pathlib.Path, output: pathlib.Path, archs: list[str]):
        self.build, self.output, self.archs = build, output, archs
        self.cxx = os.environ.get("CXX", "g++")
        includes, self.torch_lib = torch_paths()
        includes = [*includes, sysconfig.get_paths()["include"], str(CSRC)]
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
            self.add(source, [self.cxx, *binding, *extra], f"binding.{source.stem}")
        for source in sorted((CSRC / "cpu").glob("*.cpp")):
            for name, flags in isas("int8" in source.stem).items():
                self.add(source, [self.cxx, *common, *CPU_FLAGS, f"-DTF_ISA={name}", *flags, f"-I{CSRC}"],
                         f"{name}.{source.stem}")  # fmt: skip
        for source in sorted((CSRC / "cuda").glob("*.cu")) if archs else []:
            self.add(source, [nvcc(), *CUDA_FLAGS, *gencode(source, archs), f"-I{CSRC}", f"-I{CSRC}/cuda"],
                     f"cuda.{source.stem}")  # fmt: skip

    def add(self, source: pathlib.Path, command: list[str], stem: str) -> None:
        self.objects.append((command, source, self.build / f"{stem}.o"))

    def link(self) -> list[str]:
        # CUDA's runtime is linked in, and the driver found at run time: the library loads where there is no CUDA.
        linker = [nvcc(), "-ccbin", self.cxx, "-cudart", "static", "-Xlinker", "--exclude-libs=ALL"]
        return [*(linker if self.archs else [self.cxx]), "-shared", "-o", str(self.output),
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


class BuildNative(build_ext):
    def build_extension(self, ext: Extension) -> None:
        output = pathlib.Path(self.get_ext_fullpath(ext.name)).resolve()
        output = output.with_name("_C.abi3.so")
        output.parent.mkdir(parents=True, exist_ok=True)
        output.unlink(missing_ok=True)  # never ship an older build when this one fails
        build = ROOT / "build" / f"native-{platform.machine()}"
        try:
            try:
                plan = Plan(build, build / "_C.abi3.so", cuda_archs())
                plan.run()
            except subprocess.CalledProcessError as error:
                if not plan.archs or os.environ.get("TRANSFORMER_FAST_REQUIRE_NATIVE") == "1":
                    raise
                print(f"transformer_fast: built without CUDA kernels ({error})", file=sys.stderr)
                plan = Plan(build, build / "_C.abi3.so", [])
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
