"""x W^T on the CPU: by torch's oneDNN where that beats the BLAS behind F.linear; long sums, and few rows in bfloat16,
by kernels of our own."""

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

# F.linear's product of bfloat16 in matrix tiles (AMX) lays the weight out in every call, which for few rows takes more
# time than the product. Our kernel reads the weight in place. Of F.linear's time it takes a fifth to a half up to 32
# rows, 0.9 at 256 rows, as much at 512 (one and two threads, Intel Xeon, Emerald Rapids, 768 x 768 to 1024 x 4096).
_IN_PLACE_ROWS = 256


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
    return why_not_onednn() if dtype == torch.float32 else f"F.linear is as fast in {dtype}"


def _vendor() -> str:
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("vendor_id"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return ""


def reads_in_place(rows: int, weight: torch.Tensor) -> bool:
    """Whether the product of `rows` rows and a bfloat16 weight (N, K) is one for our kernel of matrix tiles."""
    return (
        weight.dtype == torch.bfloat16
        and rows <= _IN_PLACE_ROWS
        and weight.stride(1) == 1
        and not native.load()
        and native.current_isa() == "avx512_amx"
    )


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None) -> torch.Tensor:
    """activation(x W^T + b) for x (M, K) and weight (N, K) of one dtype, any strides, no size 0. Not differentiable.
    activation must be None unless the dtype is float32 or the weight is read in place."""
    if reads_in_place(x.shape[0], weight):
        return few_rows(x, weight, bias, activation)
    if x.dtype != torch.float32:
        return torch.nn.functional.linear(x, weight, bias)
    if x.shape[1] > _LONG and 1 in weight.stride():
        return _long_sums(x, weight, bias, activation)
    if not _is_dense(weight):
        y = torch.nn.functional.linear(x, weight, bias)
        return y if activation is None else eager.bias_activation(y, None, None, activation)
    if bias is not None and bias.stride(0) != 1:
        bias = bias.contiguous()  # oneDNN ignores the stride of the bias
    kind, variant = _POST_OPS[activation]
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, kind, [], variant)


def few_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None) -> torch.Tensor:
    """The same for a weight that `reads_in_place`."""
    y = memory.empty((x.shape[0], weight.shape[0]), x.dtype, x.device)
    bias = None if bias is None else bias.contiguous()
    code = _CODES[activation]
    torch.ops.transformer_fast.cpu_linear_bf16.default(memory.unit_stride(x), weight, bias, code, y)
    return y


def gradient(x: torch.Tensor, weight: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + other, as `linear`, for a gradient, which may have a larger error than an output. other: (M, N) or
    None."""
    if other is None and why_not_own_weight_gradient(x.t(), weight.t()) == "":
        return weight_gradient(x.t(), weight.t())
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
