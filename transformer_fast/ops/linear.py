"""y = activation(x W^T + b) by the fastest GEMM for the processor, and several projections of one input."""

import weakref
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..backends import forced_name, gemm, memory, select
from . import _common
from .activation import ACTIVATIONS, bias_activation
from .linear_panel import PanelWeight, linear_panel, to_panels

__all__ = ["linear", "to_panels", "projections"]


# Up to this many outputs MKL computes dot products with parallel partial sums: twice as accurate as oneDNN, and no
# slower.
_FEW_OUTPUTS = 11


def _is_fast(input: torch.Tensor, weight, bias: torch.Tensor | None) -> bool:
    """True when a backend has its own kernel for this call. Otherwise torch's F.linear is used."""
    if not _is_alike(input, weight, bias) or weight.shape[0] <= _FEW_OUTPUTS:
        return False
    if forced_name() == "cpu" and gemm.why_torchs_product(input.dtype):
        return False  # a preference of the CPU backend, no reason to refuse the call
    return select(("linear", "cpu", input.dtype, input.shape[-1], ())).name == "cpu"


def _sums_bias_gradient(input: torch.Tensor, weight, bias: torch.Tensor | None) -> bool:
    """True for 16-bit calls where a backend has the kernels of activations, and with them its own sum over rows for the
    gradient of the bias."""
    return (
        input.dtype in (torch.bfloat16, torch.float16)
        and _is_alike(input, weight, bias)
        and select(("bias_activation", "cpu", input.dtype, weight.shape[0], ())).name == "cpu"
    )


def _is_alike(input: torch.Tensor, weight, bias: torch.Tensor | None) -> bool:
    """True for plain tensors of one dtype on the CPU, outside autocast and without a size of 0."""
    if not _common.plain(input, weight, bias):
        return False
    if input.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    if weight.dtype != input.dtype or (bias is not None and bias.dtype != input.dtype):
        return False
    return 0 not in input.shape and 0 not in weight.shape


def _check(input, weight, bias, activation, name="weight", bias_name="bias") -> None:
    _common.check_floating("input", input)
    if type(weight) is not PanelWeight:
        _common.check_floating(name, weight)
        if weight.device != input.device:
            _common.check_same(name, weight, "input", input, dtype=False)
    _common.check_choice("activation", activation, (None, *ACTIVATIONS))
    if len(weight.shape) != 2:
        raise ValueError(f"{name}: wanted shape (out, in), got {tuple(weight.shape)}")
    if not input.dim() or input.shape[-1] != weight.shape[1]:
        raise ValueError(f"input: wanted shape (..., {weight.shape[1]}) as {name} is {tuple(weight.shape)}, "
                         f"got {tuple(input.shape)}")  # fmt: skip
    if bias is not None:
        _common.check_floating(bias_name, bias)
        if bias.device != input.device:
            _common.check_same(bias_name, bias, "input", input, dtype=False)
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0]):
        raise ValueError(f"{bias_name}: wanted shape ({weight.shape[0]},), got {tuple(bias.shape)}")


def _plain(input, weight, bias, activation) -> torch.Tensor:
    if _common.autocast_dtype(input.device) is None:
        _common.check_same("weight", weight, "input", input)
        if bias is not None:
            _common.check_same("bias", bias, "input", input)
    if activation is None:
        return F.linear(input, weight, bias)
    # F.linear gets the bias, because it adds the bias before rounding. Adding it to the rounded product can change the
    # sign of the sum, and with it relu's gradient.
    return bias_activation(F.linear(input, weight, bias), None, activation)


def _forward(input, weight, bias, activation) -> torch.Tensor:
    x = input if input.dim() == 2 else input.reshape(-1, input.shape[-1])
    y = gemm.linear(x, weight, bias, activation)
    if input.dim() == 2:
        return y
    # A plain view would be a view for autograd too, and the caller could not change the result in place.
    return torch.ops.aten._unsafe_view.default(y, (*input.shape[:-1], y.shape[-1]))


def _column_sum(x: torch.Tensor) -> torch.Tensor:
    if _common.batched(x):
        return x.sum(0)
    out = torch.empty(x.shape[1], dtype=torch.float32)
    torch.ops.transformer_fast.cpu_column_sum.default(x, out)
    return out


class _Weight:
    """What the gradient of a weight (out, in) needs to know of it, without keeping its memory."""

    def __init__(self, weight: torch.Tensor):
        self.shape, self.contiguous = weight.shape, weight.is_contiguous()
        self.transposed = weight.stride(0) == 1 and not self.contiguous
        self.itself = weakref.ref(weight)

    def gradient(self, g: torch.Tensor, x: torch.Tensor, sums: torch.Tensor | None = None) -> torch.Tensor:
        """g^T x (out, in) with the weight's memory layout, for g (M, out) and x (M, in). sums (out,) receives the
        column sums of g."""
        if self.contiguous and not gemm.why_not_own_weight_gradient(g, x):
            return gemm.weight_gradient(g, x, sums, memory.empty_gradient(self.itself(), self.shape, torch.float32))
        if sums is not None:
            sums.copy_(_column_sum(g))
        return gemm.gradient(x.t(), g.t()).t() if self.transposed else gemm.gradient(g.t(), x.t())


class _Linear(torch.autograd.Function):
    """It saves what F.linear saves: the input for the weight's gradient, the weight for the input's."""

    @staticmethod
    def forward(ctx, input, weight, bias):
        need_input, need_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(input if need_weight else None, weight if need_input else None)
        ctx.shape, ctx.outputs, ctx.weight = input.shape, weight.shape[0], _Weight(weight)
        return _forward(input, weight, bias, None)

    @staticmethod
    def backward(ctx, grad):
        input, weight = ctx.saved_tensors
        need_input, need_weight, need_bias = ctx.needs_input_grad
        grad_input = grad_weight = grad_bias = sums = None
        g = grad.reshape(-1, ctx.outputs)
        x = None if input is None else input.reshape(-1, ctx.shape[-1])
        if torch.is_grad_enabled():  # for gradients of gradients, in plain PyTorch
            if need_input:
                grad_input = torch.mm(g, weight).view(ctx.shape)
            return grad_input, torch.mm(g.t(), x) if need_weight else None, g.sum(0) if need_bias else None
        g = g.contiguous()
        if need_bias and need_weight and g.dtype == torch.float32 and not _common.batched(g):
            sums = torch.empty(g.shape[1], dtype=torch.float32)
        elif need_bias:
            grad_bias = _column_sum(g).to(g.dtype)
        if need_input:
            grad_input = gemm.gradient(g, weight.t()).view(ctx.shape)
        if need_weight:
            grad_weight = ctx.weight.gradient(g, x, sums)
        return grad_input, grad_weight, grad_bias if sums is None else sums


def linear(
    input: torch.Tensor,
    weight: torch.Tensor | PanelWeight,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """y = activation(x W^T + b).

    Args:
        input: (..., in), float16, bfloat16 or float32 (float64 in plain PyTorch). Under autocast it behaves as
            torch.nn.functional.linear.
        weight: (out, in), input's dtype, or a result of to_panels (inference only).
        bias: (out,), input's dtype.
        activation: None, "gelu" (erf), "gelu_tanh", "relu" or "silu"; fused with the bias.

    Returns:
        (..., out) in input's dtype. All tensors get gradients.

    Raises:
        TypeError, ValueError: if an argument is invalid; the message names it, its value and what is expected.

    Source:
        Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016, for the default activation of transformers.

    Examples:
        >>> import torch, transformer_fast
        >>> transformer_fast.linear(torch.randn(4, 8), torch.randn(16, 8), torch.zeros(16), "gelu").shape
        torch.Size([4, 16])
    """
    _check(input, weight, bias, activation)
    if isinstance(weight, PanelWeight):
        return linear_panel(input, weight, bias, activation)
    grad = torch.is_grad_enabled() and (
        input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    if not _is_fast(input, weight, bias) and not (
        grad and activation is not None and _sums_bias_gradient(input, weight, bias)
    ):
        return _plain(input, weight, bias, activation)
    if grad:
        y = _Linear.apply(input, weight, bias)
        return y if activation is None else bias_activation(y, None, activation)
    return _forward(input, weight, bias, activation)


# ---- several projections of one input ------------------------------------------------------------
class _Projections(torch.autograd.Function):
    """n projections of one input. parameters: n weights, then n biases (or None). The input gradients are accumulated
    inside the matrix products. It saves what n calls of F.linear save."""

    @staticmethod
    def forward(ctx, n, input, *parameters):
        weights, biases = parameters[:n], parameters[n:]
        need_input, needs = ctx.needs_input_grad[1], ctx.needs_input_grad[2:]
        ctx.save_for_backward(input if any(needs[:n]) else None, *(w if need_input else None for w in weights))
        ctx.n, ctx.shape, ctx.weights = n, input.shape, [_Weight(w) for w in weights]
        ctx.set_materialize_grads(False)
        found = tuple(_forward(input, w, b, None) for w, b in zip(weights, biases))
        if not need_input:
            ctx.mark_non_differentiable(*(y for i, y in enumerate(found) if not (needs[i] or needs[n + i])))
        return found

    @staticmethod
    def backward(ctx, *grads):
        input, *weights = ctx.saved_tensors
        n, shape, plain = ctx.n, ctx.shape, torch.is_grad_enabled()
        need_input, needs = ctx.needs_input_grad[1], ctx.needs_input_grad[2:]
        x = None if input is None else input.reshape(-1, shape[-1])
        grad_input, grad_weights, grad_biases = None, [None] * n, [None] * n
        for i, grad in enumerate(grads):
            if grad is None:
                continue
            g = grad.reshape(-1, ctx.weights[i].shape[0])
            if plain:  # for gradients of gradients, in plain PyTorch
                if needs[n + i]:
                    grad_biases[i] = g.sum(0)
                if needs[i]:
                    grad_weights[i] = torch.mm(g.t(), x)
                if need_input:
                    term = torch.mm(g, weights[i])
                    grad_input = term if grad_input is None else grad_input + term
                continue
            g = g.contiguous()
            if needs[n + i]:
                grad_biases[i] = _column_sum(g).to(g.dtype)
            if needs[i]:
                grad_weights[i] = ctx.weights[i].gradient(g, x)
            if need_input and grad_input is None:
                grad_input = gemm.gradient(g, weights[i].t())
            elif need_input:
                grad_input = gemm.gradient(g, weights[i].t(), grad_input)
        if grad_input is not None:
            grad_input = grad_input.view(shape)
        return None, grad_input, *grad_weights, *grad_biases


_FEW = 64  # up to this many rows the overhead of oneDNN calls exceeds the gain (measured on an AMD EPYC, Zen 5)


def _are_few_rows(input, weights, biases) -> bool:
    return (
        input.dtype == torch.float32
        and input.numel() <= _FEW * input.shape[-1]
        and input.is_contiguous()
        and all(w.stride(1) == 1 for w in weights)
        and all(b is None or b.is_contiguous() for b in biases)
    )


def _project_few_rows(input, weights, biases) -> tuple[torch.Tensor, ...]:
    found = tuple(memory.empty((*input.shape[:-1], w.shape[0]), input.dtype, input.device) for w in weights)
    torch.ops.transformer_fast.cpu_linear_rows.default(
        input.view(-1, input.shape[-1]), weights, biases, -1, [y.view(-1, y.shape[-1]) for y in found]
    )
    return found


def projections(
    input: torch.Tensor,
    weights: Sequence[torch.Tensor | PanelWeight],
    biases: Sequence[torch.Tensor | None] | None = None,
) -> tuple[torch.Tensor, ...]:
    """x W_i^T + b_i for each i: several projections of one input, such as query, key and value.

    Args:
        input: (..., in), float16, bfloat16 or float32 (float64 in plain PyTorch).
        weights: a list of (out_i, in) tensors, or of to_panels results (inference only). They are not copied.
        biases: a list with (out_i,) or None for each weight; or None.

    Returns:
        A tuple of (..., out_i) in input's dtype. All tensors get gradients. The input gradients are accumulated inside
        the matrix products.

    Raises:
        TypeError, ValueError: if an argument is invalid; the message names it, its value and what is expected.

    Examples:
        >>> import torch, transformer_fast
        >>> x, weights = torch.randn(4, 8), [torch.randn(16, 8), torch.randn(2, 8)]
        >>> [tuple(y.shape) for y in transformer_fast.projections(x, weights)]
        [(4, 16), (4, 2)]
    """
    for name, tensors in (("weights", weights), ("biases", biases)):
        if not isinstance(tensors, (list, tuple)) and not (tensors is None and name == "biases"):
            raise TypeError(f"{name}: wanted a list of tensors, got {type(tensors).__name__}")
    if not weights:
        raise ValueError("weights: wanted at least one, got none")
    if biases is not None and len(biases) != len(weights):
        raise ValueError(f"biases: wanted as many as weights ({len(weights)}), got {len(biases)}")
    biases = (None,) * len(weights) if biases is None else tuple(biases)
    plain = [w for w in weights if not isinstance(w, PanelWeight)]
    if len(plain) == len(weights):
        for i, (weight, bias) in enumerate(zip(plain, biases)):
            _check(input, weight, bias, None, f"weights[{i}]", f"biases[{i}]")
        if all(_is_fast(input, w, b) for w, b in zip(plain, biases)):
            parameters = (input, *plain, *biases)
            if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in parameters):
                if input.dtype == torch.float32:  # else nothing is gained from adding inside the products
                    return _Projections.apply(len(plain), *parameters)
            elif _are_few_rows(input, plain, biases):
                return _project_few_rows(input, plain, biases)
    return tuple(linear(input, w, b) for w, b in zip(weights, biases))
