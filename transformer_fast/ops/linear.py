"""y = activation(x W^T + b): the fastest GEMM of the machine, and several projections of one input as one."""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..backends import eager, gemm, memory, select
from . import _common
from .activation import ACTIVATIONS, bias_activation
from .packed_weight import PackedWeight, linear_packed, pack_weight

__all__ = ["adjacent", "linear", "pack_storage", "pack_weight", "packed_linear"]


def _is_fast(input: torch.Tensor, weight, bias: torch.Tensor | None) -> bool:
    """True when a backend has a product of its own for this call, else torch's F.linear makes it."""
    return _runs_on(input, weight, bias, "linear")


def _fuses_gradient(input: torch.Tensor, weight, bias: torch.Tensor | None) -> bool:
    """True when a backend computes the gradients of bias and activation together, in 16 bits too."""
    return input.dtype in (torch.bfloat16, torch.float16) and _runs_on(input, weight, bias, "bias_activation")


def _runs_on(input: torch.Tensor, weight, bias: torch.Tensor | None, op: str) -> bool:
    if not _common.plain(input, weight, bias):
        return False
    if input.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    if weight.dtype != input.dtype or (bias is not None and bias.dtype != input.dtype):
        return False
    if 0 in input.shape or 0 in weight.shape:
        return False
    return select((op, "cpu", input.dtype, input.shape[-1], ())).name == "cpu"


def _check(input, weight, bias, activation) -> None:
    _common.check_floating("input", input)
    if type(weight) is not PackedWeight:
        _common.check_floating("weight", weight)
        if weight.device != input.device:
            _common.check_same("weight", weight, "input", input, dtype=False)
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation: {activation!r} is unknown; there are None, {', '.join(ACTIVATIONS)}")
    if len(weight.shape) != 2:
        raise ValueError(f"weight: wanted shape (out, in), got {tuple(weight.shape)}")
    if not input.dim() or input.shape[-1] != weight.shape[1]:
        raise ValueError(f"input: wanted shape (..., {weight.shape[1]}) as weight is {tuple(weight.shape)}, "
                         f"got {tuple(input.shape)}")  # fmt: skip
    if bias is not None:
        _common.check_floating("bias", bias)
        if bias.device != input.device:
            _common.check_same("bias", bias, "input", input, dtype=False)
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0]):
        raise ValueError(f"bias: wanted shape ({weight.shape[0]},), got {tuple(bias.shape)}")


def _plain(input, weight, bias, activation) -> torch.Tensor:
    if _common.autocast_dtype(input.device) is None:
        _common.check_same("weight", weight, "input", input)
        if bias is not None:
            _common.check_same("bias", bias, "input", input)
    if activation is None:
        return F.linear(input, weight, bias)
    # The bias goes into the product, which adds it before it rounds: a sum of two rounded numbers has another sign now
    # and then, and relu's gradient another value.
    return bias_activation(F.linear(input, weight, bias), None, activation)


def _forward(input, weight, bias, activation) -> torch.Tensor:
    if input.dim() == 2:
        return gemm.linear(input, weight, bias, activation)
    y = gemm.linear(input.reshape(-1, input.shape[-1]), weight, bias, activation)
    # Not a view for autograd: the caller may change the result in place.
    return torch.ops.aten._unsafe_view.default(y, (*input.shape[:-1], y.shape[-1]))


def _column_sum(x: torch.Tensor) -> torch.Tensor:
    if _common.batched(x):
        return x.sum(0)
    out = torch.empty(x.shape[1], dtype=torch.float32)
    torch.ops.transformer_fast.cpu_column_sum.default(x, out)
    return out


def _backward(grad, input, weight, bias, pre, activation, need):
    """Gradients to input, weight (as one matrix) and bias; pre is x W^T + b, kept when there is an activation."""
    x = input.reshape(-1, input.shape[-1])
    g = grad.reshape(-1, weight.shape[0]).contiguous()
    grad_bias = None
    if activation is not None:
        g, grad_bias, _ = torch.ops.transformer_fast.bias_activation_backward.default(
            g, pre, None, None, activation, need[2]
        )
    elif need[2]:
        grad_bias = _column_sum(g)
    if need[2]:
        grad_bias = grad_bias.to(bias.dtype)
    grad_input = gemm.linear(g, weight.t(), None, None).view(input.shape) if need[0] else None
    grad_weight = None
    if need[1] and weight.stride(0) == 1 and not weight.is_contiguous():  # a transposed weight: its layout for the sum
        grad_weight = gemm.linear(x.t(), g.t(), None, None).t()
    elif need[1]:
        grad_weight = gemm.linear(g.t(), x.t(), None, None)
    return grad_input, grad_weight, grad_bias


def _differentiable_backward(grad, input, weights, biases, activation):
    """The same through torch's own formulas, for gradients of gradients."""

    def function(input, *parameters):
        weight = torch.cat(parameters[: len(weights)])
        bias = torch.cat(parameters[len(weights) :]) if biases else None
        y = F.linear(input, weight, bias)
        return (y if activation is None else eager.bias_activation(y, None, None, activation),)

    return _common.gradients(function, (input, *weights, *biases), (grad,))


class _Linear(torch.autograd.Function):
    """One input, n weights that are used as one, and n biases or none."""

    @staticmethod
    def forward(ctx, activation, n, input, *parameters):
        weights, biases = parameters[:n], parameters[n:]
        weight, bias = _join(weights), _join(biases)
        ctx.activation, ctx.n = activation, n
        if activation is None:
            ctx.save_for_backward(input, *parameters)
            return _forward(input, weight, bias, None)
        pre = _forward(input, weight, bias, None)
        ctx.save_for_backward(input, *parameters, pre)
        return bias_activation(pre, None, activation)

    @staticmethod
    def backward(ctx, grad):
        saved, n = ctx.saved_tensors, ctx.n
        needs = ctx.needs_input_grad[2:]
        input, parameters = saved[0], saved[1 : 1 + len(needs) - 1]
        weights, biases = parameters[:n], parameters[n:]
        if torch.is_grad_enabled():
            found = _differentiable_backward(grad, input, weights, biases, ctx.activation)
            return None, None, *found
        pre = None if ctx.activation is None else saved[-1].view(-1, saved[-1].shape[-1])
        need = (needs[0], any(needs[1 : 1 + n]), any(needs[1 + n :]))
        grad_input, grad_weight, grad_bias = _backward(
            grad, input, _join(weights), _join(biases), pre, ctx.activation, need
        )
        sizes = [w.shape[0] for w in weights]
        grad_weights = grad_weight.split(sizes) if need[1] else [None] * n
        grad_biases = grad_bias.split(sizes) if need[2] else [None] * len(biases)
        found = (grad_input, *grad_weights, *grad_biases)
        return None, None, *(g if wanted else None for g, wanted in zip(found, needs))


def linear(
    input: torch.Tensor,
    weight: torch.Tensor | PackedWeight,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """y = activation(x W^T + b).

    input: (..., in), float16, bfloat16, float32 (or float64 in plain PyTorch); weight: (out, in), or a pack_weight
    result (inference only); bias: (out,). Under autocast as torch.nn.functional.linear. activation: None or one of
    bias_activation's names, fused with the bias. Returns (..., out). Gradients to every tensor.
    Raises TypeError or ValueError naming the argument.
    """
    _check(input, weight, bias, activation)
    if isinstance(weight, PackedWeight):
        return linear_packed(input, weight, bias, activation)
    grad = torch.is_grad_enabled() and (
        input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    if not _is_fast(input, weight, bias) and not (
        grad and activation is not None and _fuses_gradient(input, weight, bias)
    ):
        return _plain(input, weight, bias, activation)
    if grad:
        return _Linear.apply(activation, 1, input, weight, *(() if bias is None else (bias,)))
    return _forward(input, weight, bias, activation)


# ---- several weights as one ----------------------------------------------------------------------
def adjacent(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The tensors as one, joined along their first dimension, without a copy; None unless they are plain contiguous
    tensors of one dtype and trailing shape that lie one after the other in memory. Not differentiable."""
    first = tensors[0]
    if not _common.is_plain(*tensors) or not first.dim():
        return None
    size, end, rows = first.element_size(), first.data_ptr(), 0
    for t in tensors:
        if t.dtype != first.dtype or t.device != first.device or t.shape[1:] != first.shape[1:]:
            return None
        if t.data_ptr() != end or not end or not t.is_contiguous():
            return None
        end += t.numel() * size
        rows += t.shape[0]
    storage = first.untyped_storage()
    if end > storage.data_ptr() + storage.nbytes():
        return None
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride())


def _join(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    if len(tensors) < 2:
        return tensors[0] if tensors else None
    whole = adjacent(tensors)
    return torch.cat(list(tensors)) if whole is None else whole


def pack_storage(parameters: Sequence[torch.nn.Parameter]) -> bool:
    """Lays the parameters one after the other in one new storage, so that packed_linear needs no copy.

    They stay the same objects with the same values: names, optimizers and checkpoints see no change. Returns True
    when they are adjacent afterwards; False, and nothing is touched, when they are not plain parameters of one
    dtype, device and trailing shape, when one occurs twice, was made in inference mode, or when another process shares
    their memory.
    """
    first = parameters[0]
    if adjacent(parameters) is not None:
        return True
    if len({id(p) for p in parameters}) < len(parameters) or not first.dim() or not _common.plain(*parameters):
        return False
    for p in parameters:
        if p.dtype != first.dtype or p.device != first.device or p.shape[1:] != first.shape[1:]:
            return False
        if (
            p.device.type not in ("cpu", "cuda")
            or p.is_shared()
            or p.is_inference()
            or not p.is_leaf
            or p.layout != torch.strided
        ):
            return False
    with torch.no_grad():
        whole = torch.cat([p.detach() for p in parameters])
        for p, view in zip(parameters, whole.split([p.shape[0] for p in parameters])):
            memory.unload(p.detach())  # a checkpoint's file stays mapped while any other parameter lies in it
            p.data = view
    return True


def packed_linear(
    input: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor] | None = None
) -> torch.Tensor:
    """x [W1; W2; ...]^T + [b1; b2; ...]: several projections of one input as one GEMM, (..., out1 + out2 + ...).

    input: (..., in); weights: (out_i, in) each; biases: (out_i,) each, or None. When the weights lie one after the
    other in memory (pack_storage) they are used as they lie, else they are joined first. Gradients to every tensor.
    Raises TypeError or ValueError naming the argument.
    """
    for name, tensors in (("weights", weights), ("biases", biases)):
        if not isinstance(tensors, (list, tuple)) and not (tensors is None and name == "biases"):
            raise TypeError(f"{name}: wanted a list of tensors, got {type(tensors).__name__}")
    if not weights:
        raise ValueError("weights: wanted at least one, got none")
    if biases is not None and len(biases) != len(weights):
        raise ValueError(f"biases: wanted as many as weights ({len(weights)}), got {len(biases)}")
    for weight, bias in itertools.zip_longest(weights, biases or ()):
        _check(input, weight, bias, None)
        if biases is not None and bias is None:
            raise TypeError("bias: wanted a tensor for each weight, got None; biases=None stands for none at all")
    parameters = (*weights, *(biases or ()))
    if not _common.plain(*parameters):
        return F.linear(input, torch.cat(list(weights)), None if biases is None else torch.cat(list(biases)))
    grad = torch.is_grad_enabled() and (input.requires_grad or any(p.requires_grad for p in parameters))
    same = all(p.dtype == input.dtype for p in parameters)
    if grad:
        if same and _is_fast(input, weights[0], None):
            return _Linear.apply(None, len(weights), input, *parameters)
        if any(p.requires_grad for p in parameters):
            return F.linear(input, torch.cat(list(weights)), None if biases is None else torch.cat(list(biases)))
    return linear(input, _join(weights), _join(biases or ()))  # type: ignore[arg-type]
