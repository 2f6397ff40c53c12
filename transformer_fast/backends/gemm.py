"""x W^T on the CPU by torch's oneDNN, where that beats the BLAS behind F.linear."""

import functools
import pathlib

import torch

from . import eager

# What oneDNN calls our activations, and the variant.
_POST_OPS = {
    None: ("none", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
}


@functools.cache
def why_not_onednn() -> str:
    """'' where float32 products should go to oneDNN, else the reason why not.

    torch's float32 GEMM is MKL's, which is at its best on Intel's processors and leaves about a fifth of the peak
    unused on AMD's; oneDNN generates its code for the instruction set alone.
    """
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this torch was built without oneDNN"
    if torch.backends.mkl.is_available() and _vendor() != "AuthenticAMD":
        return "torch's own GEMM is MKL's, which is fastest on this processor"
    return ""


def _vendor() -> str:
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("vendor_id"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return ""


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None) -> torch.Tensor:
    """activation(x W^T + b): x (M, K), weight (N, K), any strides, no size 0, one dtype; not differentiable. An
    activation is for float32 alone."""
    if x.dtype != torch.float32:
        return torch.nn.functional.linear(x, weight, bias)
    if not _is_dense(weight):
        y = torch.nn.functional.linear(x, weight, bias)
        return y if activation is None else eager.bias_activation(y, None, None, activation)
    if bias is not None and bias.stride(0) != 1:
        bias = bias.contiguous()  # oneDNN reads it as if it were
    kind, variant = _POST_OPS[activation]
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, kind, [], variant)


def linear_plus(x: torch.Tensor, weight: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """x W^T + other, other (M, N); else as linear."""
    if not _is_dense(weight):
        return torch.addmm(other, x, weight.t())
    return torch.ops.mkldnn._linear_pointwise.binary(x, other, weight, None, "add")


def _is_dense(weight: torch.Tensor) -> bool:
    """False where the rows (or columns) do not follow one another: for those oneDNN has plain loops alone, a thousand
    times slower."""
    rows, columns = weight.shape
    return weight.stride() in ((columns, 1), (1, rows))
