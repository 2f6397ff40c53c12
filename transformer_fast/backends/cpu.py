"""C++ kernels for the CPU (csrc/cpu), chosen per instruction set at run time."""

import torch

from . import Backend, Call, native

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OPS = frozenset({"norm"})


class CpuBackend(Backend):
    name = "cpu"

    def why_not(self, call: Call) -> tuple[str, ...]:
        reasons = []
        missing = native.load()
        if missing:
            reasons.append(missing)
        if call.device != "cpu":
            reasons.append(f"device {call.device} is not cpu")
        if call.dtype not in _DTYPES:
            reasons.append(f"dtype {call.dtype} is not float32, bfloat16 or float16")
        if call.op not in _OPS:
            reasons.append(f"there is no CPU kernel for {call.op}")
        return tuple(reasons)

    def norm_forward(self, spec, y, sum_out, mean, rstd) -> None:
        torch.ops.transformer_fast.cpu_norm_forward.default(
            spec.x, spec.residual, _float(spec.weight), _float(spec.bias), spec.rng, spec.eps, spec.rms,
            spec.dropout_p, y, sum_out, mean, rstd,
        )  # fmt: skip


def _float(t: torch.Tensor | None) -> torch.Tensor | None:
    """Weights as contiguous float32: a few kilobytes, so kernels have one path."""
    return None if t is None else t.detach().to(torch.float32).contiguous()


BACKEND = CpuBackend()
