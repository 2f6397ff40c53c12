"""Builds csrc/ with AddressSanitizer and UndefinedBehaviorSanitizer, in a separate folder, and fuzzes that library.

    python tests/sanitize.py --minutes 5 --seed 1          (or: make sanitize)

The arguments are those of tests/fuzz.py. --isa names the instruction sets that are instrumented and fuzzed (default:
all of this processor). A finding of a sanitizer ends the run with its report.
"""

import importlib.util
import os
import pathlib
import platform
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
FLAGS = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-O1", "-g1"]


def build(isas: list[str]) -> pathlib.Path:
    """The library, compiled as by setup.py, except for the flags of the bindings and of these instruction sets."""
    spec = importlib.util.spec_from_file_location("setup_file", ROOT / "setup.py")
    setup_file = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup_file)

    class Sanitized(setup_file.Plan):
        def add(self, source, command, stem):
            isa = stem.split(".")[0]
            if isa in ("binding", *isas):
                command = [*(option for option in command if not option.startswith("-mamx")), *FLAGS]
                if isa == "avx512_amx":
                    command.append("-DTF_EMULATE_TILES")  # the sanitizers do not see what real tiles read and write
            super().add(source, command, stem)

        def link(self):
            return [*super().link(), FLAGS[0]]

    folder = ROOT / "build" / f"sanitize-{platform.machine()}"
    plan = Sanitized(folder, folder / "_C.abi3.so", [])
    plan.run()
    return plan.output


def main() -> int:
    from transformer_fast.backends import native

    arguments = sys.argv[1:]
    isas = [isa for option, isa in zip(arguments, arguments[1:]) if option == "--isa"] or native.supported_isas()
    library = build([*isas, *(native._INT8_WIDEST[isa] for isa in isas)])  # with the matching int8 kernels
    compiler = os.environ.get("CXX", "g++")
    # The C++ library too: ASan looks up its functions when it starts, and Python loads it later.
    names = [f"-print-file-name={name}" for name in ("libasan.so", "libstdc++.so.6")]
    runtime = [subprocess.run([compiler, name], capture_output=True, text=True, check=True).stdout for name in names]
    environment = {
        **os.environ,
        "TRANSFORMER_FAST_LIBRARY": str(library),
        "LD_PRELOAD": " ".join(path.strip() for path in runtime),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:halt_on_error=1",  # Python itself leaks
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }
    return subprocess.run([sys.executable, str(ROOT / "tests/fuzz.py"), *arguments], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
