"""C++ kernels for the CPU (csrc/cpu), chosen per instruction set at run time."""

import torch

from . import Backend, Call, native

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OPS = frozenset({"norm", "bias_activation", "dropout"})
_ACTIVATIONS = {"gelu": 0, "gelu_tanh": 1, "relu": 2, "silu": 3}  # enum Activation in csrc/cpu/activation.hpp
_ops = torch.ops.transformer_fast


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
        _ops.cpu_norm_forward.default(
            spec.x, spec.residual, _float(spec.weight), _float(spec.bias), spec.rng, spec.eps, spec.rms,
            spec.dropout_p, y, sum_out, mean, rstd,
        )  # fmt: skip

    def norm_backward(self, spec, grad_y, grad_sum, mean, rstd, grad_v, grad_x, grad_weight, grad_bias) -> None:
        _ops.cpu_norm_backward.default(
            grad_y, grad_sum, spec.x, _float(spec.weight), mean, rstd, spec.rng, spec.dropout_p, grad_v, grad_x,
            grad_weight, grad_bias,
        )  # fmt: skip

    def bias_activation_forward(self, x, bias, gate, activation, y) -> None:
        _ops.cpu_bias_activation_forward.default(x, _float(bias), gate, _ACTIVATIONS[activation], y)

    def bias_activation_backward(self, grad, x, bias, gate, activation, grad_x, grad_bias, grad_gate) -> None:
        _ops.cpu_bias_activation_backward.default(
            grad, x, _float(bias), gate, _ACTIVATIONS[activation], grad_x, grad_bias, grad_gate
        )

    def dropout_forward(self, x, rng, p, y) -> None:
        _ops.cpu_dropout_forward.default(x if x.stride(1) == 1 else x.contiguous(), rng, p, y)


def _float(t: torch.Tensor | None) -> torch.Tensor | None:
    """Weights as contiguous float32: a few kilobytes, so kernels have one path."""
    return None if t is None else t.detach().to(torch.float32).contiguous()


BACKEND = CpuBackend()
