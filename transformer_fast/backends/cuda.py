"""CUDA C++ kernels (csrc/cuda) for NVIDIA GPUs from sm_80 on. The emulator in tests/ runs them on CPU tensors."""

import functools
import os
from collections.abc import Callable

import torch

from . import Backend, Call, cuda_attention, measured, native, verified

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The native op that each op needs in the compiled library.
_NATIVE: dict[str, str] = {
    "attention": "cuda_attention_forward",
    "bias_activation": "cuda_bias_activation_forward",
    "norm": "cuda_norm_forward",
    "rotary_embedding": "cuda_rotary",
}
# Further checks of a call, per op; each returns the reasons why the kernels cannot run it.
_REFUSES: dict[str, Callable[[Call], tuple[str, ...]]] = {"attention": cuda_attention.why_not}
# The architecture that a GPU of compute capability 8.x, 9.x, ... runs.
_CODE = {8: "80", 9: "90a", 10: "100", 12: "120"}
_ops = torch.ops.transformer_fast


def emulating() -> bool:
    """True when tests/cuda_emulator.py has registered the kernels for CPU tensors."""
    return os.environ.get("TRANSFORMER_FAST_CUDA_EMULATOR") == "1"


def verified_on_gpu() -> frozenset[str]:
    """Ops whose CUDA kernels have passed their tests on a GPU, according to the ledger in benchmarks/results."""
    return frozenset(op for op in CudaBackend.ops() if f"cuda {op}" in verified.names())


@functools.cache
def architectures() -> tuple[str, ...]:
    """The architectures that this build was compiled for, e.g. ("80", "90a"); () without CUDA kernels."""
    return () if native.load() else tuple(_ops.cuda_architectures().split())


def _missing() -> str:
    if native.load():
        return native.load()
    if not architectures():
        return "the native library was built without CUDA kernels (no nvcc, or no visible GPU at build time)"
    return ""


@functools.lru_cache
def _unsupported(major: int, minor: int) -> str:
    """Why GPUs of this compute capability cannot run the compiled kernels; empty when they can."""
    capability = f"the GPU has compute capability {major}.{minor}"
    if major < 8:
        return f"{capability}, below 8.0"
    code = _CODE.get(major)
    if code is None:
        return f"{capability}; there are kernels for {', '.join(f'{m}.x' for m in _CODE)}"
    if code not in architectures():
        return f"{capability}, and this build only has code for sm_{', sm_'.join(architectures())}"
    return ""


@functools.cache
def _has_kernel(op: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"transformer_fast::{op}", key)


class CudaBackend(Backend):
    name = "cuda"

    def status(self) -> str:
        if not torch.cuda.is_available():
            return "idle: no NVIDIA GPU is visible"
        missing = _missing()
        if missing:
            return f"missing: {missing}. They would bring kernels past what Triton can do on this GPU"
        unverified = ", ".join(sorted(self.ops() - verified_on_gpu()))
        note = f"compiled for sm_{', sm_'.join(architectures())}"
        note += f"; not yet run on a GPU: {unverified}" if unverified else ""
        capability = torch.cuda.get_device_capability()
        unsupported = _unsupported(*capability)
        if unsupported:
            return f"{note}; idle: {unsupported}"
        lines = [line for line in measured.LINES if line.backend == self.name and line.capability in (None, capability)]
        faster = ", ".join(sorted({line.op for line in lines}))
        chosen = f"chosen for calls of {faster} that it was measured faster for" if faster else "chosen for no call"
        return f"{note}; {chosen}; all others on request, by backend('cuda')"

    def why_not(self, call: Call) -> tuple[str, ...]:
        reasons = []
        emulated = call.device == "cpu" and emulating()
        if not emulated:
            if _missing():
                reasons.append(_missing())
            if call.device != "cuda":
                reasons.append(f"device {call.device} is not cuda")
            elif architectures() and torch.cuda.is_available():
                unsupported = _unsupported(*torch.cuda.get_device_capability())
                if unsupported:
                    reasons.append(unsupported)
        if call.dtype not in _DTYPES:
            reasons.append(f"dtype {call.dtype} is not float32, bfloat16 or float16")
        if call.op not in self.ops():
            reasons.append(f"there is no CUDA kernel for {call.op}")
        elif not reasons and not _has_kernel(_NATIVE[call.op], "CPU" if emulated else "CUDA"):
            reasons.append(f"the CUDA kernels of {call.op} were not compiled")
        if call.op in _REFUSES:
            reasons += _REFUSES[call.op](call)
        return tuple(reasons)

    def attention_forward(self, spec, out, lse):
        from .cuda_attention import attention_forward

        return attention_forward(spec, out, lse)

    def attention_append(self, spec, key, value, out, lse) -> None:
        if not cuda_attention.attention_append(spec, key, value, out, lse):
            super().attention_append(spec, key, value, out, lse)

    def attention_backward(self, spec, grad_out, grad_lse, out, lse, dq, dk, dv, dbias, dtable):
        from .cuda_attention import attention_backward

        return attention_backward(spec, grad_out, grad_lse, out, lse, dq, dk, dv, dbias, dtable)

    def norm_forward(self, spec, y, sum_out, mean, rstd):
        op, dtype = _ops.cuda_norm_forward.default, spec.x.dtype
        options = spec.eps, spec.rms, spec.dropout_p
        op(
            spec.x, spec.residual, _parameter(spec.weight, dtype), _parameter(spec.bias, dtype), _dense(spec.rng),
            *options, y, sum_out, mean, rstd,
        )  # fmt: skip
        if not _as_they_are(dtype, spec.weight, spec.bias):
            return None
        return lambda x, residual, weight, bias, rng, *outputs: op(x, residual, weight, bias, rng, *options, *outputs)

    def norm_backward(self, spec, grad_y, grad_sum, mean, rstd, grad_v, grad_x, grad_weight, grad_bias):
        op, dropout_p = _ops.cuda_norm_backward.default, spec.dropout_p
        op(
            grad_y, grad_sum, spec.x, _parameter(spec.weight, spec.x.dtype), _dense(mean), _dense(rstd),
            _dense(spec.rng), dropout_p, grad_v, grad_x, grad_weight, grad_bias,
        )  # fmt: skip
        if not _as_they_are(spec.x.dtype, spec.weight):
            return None
        return lambda grad_y, grad_sum, v, weight, rng, mean, rstd, *outputs: op(
            grad_y, grad_sum, v, weight, mean, rstd, rng, dropout_p, *outputs
        )

    def bias_activation_forward(self, x, bias, gate, activation, y):
        op, kind = _ops.cuda_bias_activation_forward.default, native.ACTIVATIONS[activation]
        op(x, _parameter(bias, x.dtype), gate, kind, y)
        return (lambda x, bias, gate, y: op(x, bias, gate, kind, y)) if _as_they_are(x.dtype, bias) else None

    def bias_activation_backward(self, grad, x, bias, gate, activation, grad_x, grad_bias, grad_gate):
        op, kind = _ops.cuda_bias_activation_backward.default, native.ACTIVATIONS[activation]
        op(grad, x, _parameter(bias, x.dtype), gate, kind, grad_x, grad_bias, grad_gate)
        if not _as_they_are(x.dtype, bias):
            return None
        return lambda grad, x, bias, gate, *outputs: op(grad, x, bias, gate, kind, *outputs)

    def rotary_embedding(self, x, cos, sin, positions, interleaved, inverse, y) -> None:
        _ops.cuda_rotary.default(x, cos, sin, positions, interleaved, inverse, y)

    def rotary_append(self, spec, y) -> None:
        *tensors, query_weight, key_weight, eps, interleaved = spec
        weights = (_parameter(w, spec.query.dtype) for w in (query_weight, key_weight))
        _ops.cuda_rotary_append.default(*tensors, *weights, eps, interleaved, y)


def _parameter(t: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A contiguous parameter in float32 or `dtype`, which are the two that the kernels read."""
    if t is None:
        return None
    t = t.detach()
    return (t if t.dtype in (dtype, torch.float32) else t.to(torch.float32)).contiguous()


def _as_they_are(dtype: torch.dtype, *parameters: torch.Tensor | None) -> bool:
    """Whether the kernels read these parameters, which are contiguous, without a conversion."""
    return all(t is None or t.dtype in (dtype, torch.float32) for t in parameters)


def _dense(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.contiguous()


BACKEND = CudaBackend()
