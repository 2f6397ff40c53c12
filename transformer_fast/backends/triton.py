"""Triton kernels (kernels/), for NVIDIA GPUs from sm_80 on; on CPU tensors under TRITON_INTERPRET=1."""

import functools
import importlib.util
import os

import torch

from . import Backend, Call

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OPS: frozenset[str] = frozenset()


@functools.cache
def _missing() -> str:
    return "" if importlib.util.find_spec("triton") else "Triton is not installed (pip install triton)"


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


class TritonBackend(Backend):
    name = "triton"

    def status(self) -> str:
        if _missing():
            return f"missing: {_missing()}. They would bring fused kernels on NVIDIA GPUs"
        if torch.cuda.is_available():
            return "active"
        return "installed, idle: no NVIDIA GPU is visible"

    def why_not(self, call: Call) -> tuple[str, ...]:
        reasons = []
        if _missing():
            reasons.append(_missing())
        if call.device != "cuda" and not (call.device == "cpu" and interpreting()):
            reasons.append(f"device {call.device} is not cuda (TRITON_INTERPRET=1 runs it on CPU tensors, slowly)")
        if call.dtype not in _DTYPES:
            reasons.append(f"dtype {call.dtype} is not float32, bfloat16 or float16")
        if call.op not in _OPS:
            reasons.append(f"there is no Triton kernel for {call.op}")
        return tuple(reasons)


BACKEND = TritonBackend()
