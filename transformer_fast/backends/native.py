"""Loads the native library, or says why there is none."""

import ctypes
import functools
import os
import pathlib
import warnings

import torch

from .source_hash import source_hash

_PACKAGE = pathlib.Path(__file__).resolve().parent.parent
_LIBRARY = pathlib.Path(os.environ.get("TRANSFORMER_FAST_LIBRARY") or _PACKAGE / "_C.abi3.so")
ACTIVATIONS = {"gelu": 0, "gelu_tanh": 1, "relu": 2, "silu": 3}  # enum Activation in csrc/cpu/activation.hpp
_NOTE = _PACKAGE / "_native_missing.txt"  # setup.py writes here why it built no library


@functools.cache
def load() -> str:
    """'' if the native ops are loaded, else the reason why not."""
    if not _LIBRARY.exists():
        return why_not_built()
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as error:
        return f"the native library does not load: {error}"
    reason = stale()
    try:
        set_isa(default_isa())
    except AttributeError:  # the library is older than an op that these Python sources call
        if reason:
            return reason
        raise
    if reason:
        warnings.warn(reason, RuntimeWarning, stacklevel=2)
    return ""


def why_not_built(root: pathlib.Path = _PACKAGE.parent) -> str:
    """Why there is no library: the note of the build, or how to build it if no build has run."""
    if _NOTE.exists():
        return _NOTE.read_text(encoding="utf-8").strip()
    if (root / "setup.py").exists():
        return f"it was not built in this checkout: cd {root} && python setup.py build_ext --inplace"
    return "this copy of transformer_fast has none; reinstall it where torch and a C++ compiler are available"


@functools.cache
def warn_missing() -> None:
    """Warn, once per process, that calls run in plain PyTorch and why."""
    warnings.warn(
        f"transformer_fast runs in plain PyTorch, without its CPU kernels: {load()}", RuntimeWarning, stacklevel=2
    )


def stale(root: pathlib.Path = _PACKAGE.parent) -> str:
    """What to do if the library was built from other sources than those next to the package; '' if it was not, or if
    there are no sources next to the package (an editable install has them)."""
    if not ((root / "csrc" / "ops.cpp").exists() and (root / "setup.py").exists()):
        return ""
    try:
        built = ctypes.c_char_p.in_dll(ctypes.CDLL(str(_LIBRARY)), "tf_source_hash").value
    except ValueError:  # built before the library carried this symbol
        built = None
    if built == source_hash(root).encode():
        return ""
    return (
        f"{_LIBRARY} was built from other sources than those in {root / 'csrc'}, and may not do what they say; "
        f"build it again: cd {root} && python setup.py build_ext --inplace"
    )


def default_isa() -> str:
    """The widest instruction set that the processor, torch and TRANSFORMER_FAST_CPU_ISA allow."""
    forced = os.environ.get("TRANSFORMER_FAST_CPU_ISA")
    if forced:
        if forced not in supported_isas():
            raise ValueError(f"TRANSFORMER_FAST_CPU_ISA={forced!r}: must be one of {', '.join(supported_isas())} here")
        return forced
    return supported_isas()[-1]


_current = ""


def set_isa(name: str) -> None:
    """Use the kernels compiled for instruction set `name` from now on, in the whole process."""
    global _current
    torch.ops.transformer_fast.cpu_set_isa(name)
    _current = name
    within = INT8_ISAS[: INT8_ISAS.index(_INT8_WIDEST[name]) + 1]
    set_int8_isa([isa for isa in supported_int8_isas() if isa in within][-1])


def current_isa() -> str:
    return _current


def multiplies_bfloat16() -> bool:
    """True if the instruction set in use multiplies bfloat16."""
    return current_isa() in _MULTIPLIES_BFLOAT16


INT8_ISAS = ("baseline", "avx2", "avx_vnni", "avx512", "avx512_vnni", "avx512_amx")
# Each instruction set, and the widest instruction set of the int8 kernels that may run with it.
_INT8_WIDEST = {
    "baseline": "baseline",
    "avx2": "avx_vnni",
    "avx512": "avx512_vnni",
    "avx512_bf16": "avx512_vnni",
    "avx512_amx": "avx512_amx",
}
ISAS = tuple(_INT8_WIDEST)
_MULTIPLIES_BFLOAT16 = ("avx512_bf16", "avx512_amx")
# Per capability of torch; else all.
_ALLOWED = {"DEFAULT": ("baseline",), "AVX2": ("baseline", "avx2")}
_INT8_ALLOWED = {"DEFAULT": ("baseline",), "AVX2": ("baseline", "avx2", "avx_vnni")}
_current_int8 = ""


def set_int8_isa(name: str) -> None:
    """Use the int8 kernels compiled for instruction set `name` from now on, in the whole process."""
    global _current_int8
    torch.ops.transformer_fast.cpu_set_int8_isa(name)
    _current_int8 = name


def current_int8_isa() -> str:
    return _current_int8


def supported_int8_isas() -> list[str]:
    """Compiled instruction sets of the int8 kernels that this processor can run, narrowest first."""
    allowed = _INT8_ALLOWED.get(torch.backends.cpu.get_cpu_capability())
    found = torch.ops.transformer_fast.cpu_int8_isas().split()
    return [name for name in found if allowed is None or name in allowed]


def supported_isas() -> list[str]:
    """Compiled instruction sets that this processor can run, narrowest first. ATEN_CPU_CAPABILITY, which limits torch
    to a narrower one, applies here too."""
    if not hasattr(torch.ops.transformer_fast, "cpu_isas") and load():
        return []
    allowed = _ALLOWED.get(torch.backends.cpu.get_cpu_capability())
    found = torch.ops.transformer_fast.cpu_isas().split()
    return [name for name in found if allowed is None or name in allowed]
