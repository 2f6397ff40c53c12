"""x W^T on the CPU: by torch's oneDNN where that beats the BLAS behind F.linear; long sums, and bfloat16 in matrix
tiles, by kernels of our own."""

import functools
import pathlib

import torch

from . import eager, memory, native

# oneDNN's names of the activations, with the variant.
_POST_OPS = {
    None: ("none", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
}
_CODES = {None: -1, "gelu": 0, "gelu_tanh": 1, "relu": 2, "silu": 3}  # enum Activation in csrc/cpu/activation.hpp

# MKL splits a sum into running sums of at most 192 products, all of about equal length. oneDNN's running sums have up
# to 1024 products, and more where a sum is longer. With numbers of one sign the error grows with that length: it is 2
# times MKL's at 384 inputs, 2.5 times at 512, 4.5 times at 1025. So outputs with more than 192 inputs use our own
# kernel, with running sums of at most 128, and so do gradients with more than 1024. It takes 0.8 to 1.0 of oneDNN's
# time (one thread, AMD EPYC, Zen 5).
_LONG, _LONG_GRADIENT = 192, 1024
_FEW_ROWS = 16  # up to here the kernel reads the weight in place, with one running sum per vector lane


@functools.cache
def why_not_onednn() -> str:
    """'' where float32 products should go to oneDNN, else the reason why not.

    torch's float32 GEMM is MKL's. It is fastest on Intel processors and leaves about a fifth of the peak unused on AMD
    processors. oneDNN generates code for the instruction set, whatever the vendor.
    """
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this torch was built without oneDNN"
    if torch.backends.mkl.is_available() and _vendor() != "AuthenticAMD":
        return "torch's own GEMM is MKL's, which is fastest on this processor"
    return ""


def why_torchs_product(dtype: torch.dtype) -> str:
    """Why F.linear is the best product of this CPU in this dtype; '' where it is not."""
    if dtype == torch.bfloat16 and _has_tiles():
        return ""
    return why_not_onednn() if dtype == torch.float32 else f"F.linear is as fast in {dtype}"


def _has_tiles() -> bool:
    """Whether bfloat16 is multiplied by our kernel, in matrix tiles (AMX).

    F.linear lays a weight out in every call, which for few rows takes longer than the product; ours reads it in place.
    With 1000 rows and 768 outputs F.linear gains nothing from a second thread. Of F.linear's time ours takes a fifth to
    a half up to 32 rows, 0.6 to 0.8 at 128, and 0.5 to 1 past that (one and two threads, Intel Xeon, Emerald Rapids).
    """
    return native.current_isa() == "avx512_amx"


def _in_tiles(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        x.dtype == torch.bfloat16
        and _has_tiles()
        and 1 in weight.stride()
        and 1 in x.stride()
        and not _is_batched(x, weight)
    )


def _vendor() -> str:
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("vendor_id"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return ""


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None) -> torch.Tensor:
    """activation(x W^T + b) for x (M, K) and weight (N, K) of one dtype, any strides, no size 0. Not differentiable."""
    if _in_tiles(x, weight):
        return in_tiles(x, weight, bias, activation)
    if x.dtype == torch.float32 and x.shape[1] > _LONG and 1 in weight.stride():
        return _long_sums(x, weight, bias, activation)
    if x.dtype != torch.float32 or not _is_dense(weight):
        y = torch.nn.functional.linear(x, weight, bias)
        return y if activation is None else eager.bias_activation(y, None, None, activation)
    if bias is not None and bias.stride(0) != 1:
        bias = bias.contiguous()  # oneDNN ignores the stride of the bias
    kind, variant = _POST_OPS[activation]
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, kind, [], variant)


def in_tiles(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None) -> torch.Tensor:
    """The same in bfloat16 by our kernel; x and weight have a stride of 1."""
    y = memory.empty((x.shape[0], weight.shape[0]), x.dtype, x.device)
    bias = None if bias is None else bias.contiguous()
    torch.ops.transformer_fast.cpu_linear_bf16.default(x, weight, bias, _CODES[activation], y)
    return y


def gradient(x: torch.Tensor, weight: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + other, as `linear`, for a gradient, which may have a larger error than an output. other: (M, N) or
    None."""
    if other is None and why_not_own_weight_gradient(x.t(), weight.t()) == "":
        return weight_gradient(x.t(), weight.t())
    if other is None and _in_tiles(x, weight):
        return in_tiles(x, weight, None, None)
    if x.dtype != torch.float32 or not _is_dense(weight) or _is_batched(x, weight):
        return torch.nn.functional.linear(x, weight) if other is None else torch.addmm(other, x, weight.t())
    if x.shape[1] > _LONG_GRADIENT:
        y = _long_sums(x, weight, None, None)
        return y if other is None else y.add_(other)
    if other is None:
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], "")
    return torch.ops.mkldnn._linear_pointwise.binary(x, other, weight, None, "add")


def why_not_own_weight_gradient(g: torch.Tensor, x: torch.Tensor) -> str:
    """'' if weight_gradient can compute g^T x, else the reason why not."""
    if g.dtype != torch.float32 or x.dtype != torch.float32:
        return f"wanted float32, got {g.dtype} and {x.dtype}"
    if _is_batched(g, x):
        return "a batched tensor"
    if any(t.shape[1] > 1 and t.stride(1) != 1 for t in (g, x)):
        return "the rows are not contiguous"
    return ""


def weight_gradient(
    g: torch.Tensor, x: torch.Tensor, sums: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """g^T x for g (M, N) and x (M, K) with unit stride along the rows: a contiguous (N, K), written to out if given.

    sums (N,) receives the sum of g over its rows. It runs at 1.07 to 1.25 times oneDNN's speed with 64 to 1920 rows
    (one thread, AMD EPYC, Zen 5), with a third of its error.
    """
    y = memory.empty((g.shape[1], x.shape[1]), torch.float32, g.device) if out is None else out
    torch.ops.transformer_fast.cpu_weight_gradient.default(g, x, y, sums)
    return y


def _long_sums(x, weight, bias, activation) -> torch.Tensor:
    bias = None if bias is None else bias.contiguous()
    y = memory.empty((x.shape[0], weight.shape[0]), x.dtype, x.device)
    x = x if x.stride(1) == 1 else x.contiguous()
    if x.shape[0] <= _FEW_ROWS and weight.stride(1) == 1:
        torch.ops.transformer_fast.cpu_linear_rows.default(x, [weight], [bias], _CODES[activation], [y])
    else:
        torch.ops.transformer_fast.cpu_linear_long.default(x, weight, bias, _CODES[activation], y)
    return y


def _is_batched(*tensors: torch.Tensor) -> bool:
    """True if one is a batched tensor of torch.func.vmap or of is_grads_batched. Kernels cannot read those."""
    functorch = torch._C._functorch
    return any(functorch.is_batchedtensor(t) or functorch.is_legacy_batchedtensor(t) for t in tensors)


def _is_dense(weight: torch.Tensor) -> bool:
    """True if the rows or the columns lie next to each other. oneDNN has only reference loops, a thousand times slower,
    for any other strides."""
    rows, columns = weight.shape
    return weight.stride() in ((columns, 1), (1, rows))
