"""Cross entropy over large vocabularies. It stores no probabilities, and linear_cross_entropy stores no logits
either."""

import torch

from ..backends import Backend, Call, eager, memory, select
from ..backends.specs import CrossEntropySpec
from . import _common

REDUCTIONS = ("none", "mean", "sum")


def select_backend(logits: torch.Tensor) -> Backend:
    return select(Call("cross_entropy", logits.device.type, logits.dtype, logits.shape[-1]))


def loss_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def _unit_rows(t: torch.Tensor) -> torch.Tensor:
    return t if t.stride(1) == 1 or t.shape[1] <= 1 else t.contiguous()


def check_targets(target: torch.Tensor, classes: int, ignore_index: int) -> None:
    """Check target values on the CPU only. On a GPU that would synchronise; the kernels write NaN for wrong targets."""
    if target.device.type != "cpu" or not target.numel():
        return
    wrong = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if wrong.any():
        raise ValueError(
            f"target: wanted class indices in [0, {classes}) or ignore_index {ignore_index}, got "
            f"{int(target[wrong][0])}"
        )


def _forward(*args) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses, largest logits and sums of exp(x - largest), (rows,) each. The log-sum-exp alone would lose precision
    that the gradient needs."""
    *fields, _inplace_gradient = args
    spec = CrossEntropySpec(*fields)
    logits = spec.logits
    rows, classes = logits.shape
    check_targets(spec.target, classes, spec.ignore_index)
    losses, largest, total = (memory.empty((rows,), loss_dtype(logits.dtype), logits.device) for _ in range(3))
    if rows:
        spec = spec._replace(logits=_unit_rows(logits))
        select_backend(logits).cross_entropy_forward(spec, losses, largest, total)
    return losses, largest, total


def _forward_fake(logits, *_):
    return tuple(logits.new_empty((logits.shape[0],), dtype=loss_dtype(logits.dtype)) for _ in range(3))


def _backward_impl(grad_losses, largest, total, *fields, out: torch.Tensor | None = None) -> torch.Tensor:
    spec = CrossEntropySpec(*fields)
    logits = _unit_rows(spec.logits)
    if out is None:
        out = memory.empty(logits.shape, logits.dtype, logits.device)
    if out.numel():
        select_backend(logits).cross_entropy_backward(
            spec._replace(logits=logits), grad_losses.contiguous(), largest, total, out
        )
    return out


def _backward_fake(grad_losses, largest, total, logits, *_):
    return logits.new_empty(logits.shape)


_SPEC = _common.schema_of(CrossEntropySpec)
_backward_op = _common.define(
    "cross_entropy_backward",
    f"(Tensor grad_losses, Tensor largest, Tensor total, {_SPEC}) -> Tensor",
    _backward_impl,
    _backward_fake,
)


def _setup(ctx, inputs, output):
    *fields, ctx.inplace = inputs
    _, largest, total = output
    _common.save(ctx, CrossEntropySpec(*fields), largest, total)
    ctx.mark_non_differentiable(largest, total)


def _plain(spec: CrossEntropySpec) -> tuple[torch.Tensor]:
    return (eager.cross_entropy(spec),)


def _backward(ctx, need, grad_losses, _largest, _total):
    spec, largest, total = _common.saved(ctx)
    if torch.is_grad_enabled():  # gradients of gradients
        return _common.gradients_of(_plain, spec, ("logits",), (grad_losses,))
    logits = spec.logits
    arguments = (grad_losses, largest, total, *spec._replace(logits=logits.detach()))
    rows, classes = logits.shape
    own_memory = logits.stride(1) == 1 and (rows <= 1 or logits.stride(0) >= classes)
    # Not under a compiler, which plans memory itself.
    if ctx.inplace and own_memory and _common.direct(grad_losses) and not _common.batched(grad_losses):
        grad = _backward_impl(*arguments, out=logits.detach())
        torch.autograd.graph.increment_version(logits)  # autograd then raises for other users of the logits
    else:
        grad = _backward_op(*arguments)
    return {"logits": grad}


_op = _common.define(
    "cross_entropy",
    f"({_SPEC}, bool inplace_gradient) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_setup,
    backward=_backward,
)


def check_options(ignore_index, reduction, reductions, label_smoothing, z_loss) -> None:
    if not isinstance(reduction, str) or reduction not in reductions:
        raise ValueError(f"reduction: wanted one of {', '.join(map(repr, reductions))}, got {reduction!r}")
    _common.check_integer("ignore_index", ignore_index, -(2**63), 2**63 - 1)
    _common.check_number("label_smoothing", label_smoothing, 0.0, 1.0)
    _common.check_number("z_loss", z_loss, 0.0)


def class_indices(target: torch.Tensor, shape: tuple[int, ...], name: str, like: torch.Tensor) -> torch.Tensor:
    """Check target and return it as int64. shape: the expected shape; name, like: the logits, for the messages."""
    _common.check_tensor("target", target)
    if target.is_floating_point():
        raise TypeError(
            f"target: wanted class indices (int64, int32 or uint8), got {target.dtype}; class probabilities are not "
            "supported: use torch.nn.functional.cross_entropy"
        )
    if target.dtype not in (torch.int64, torch.int32, torch.uint8):
        raise TypeError(f"target: wanted class indices (int64, int32 or uint8), got {target.dtype}")
    if tuple(target.shape) != shape:
        raise ValueError(f"target: wanted shape {shape} for {name} {tuple(like.shape)}, got {tuple(target.shape)}")
    _common.check_same("target", target, name, like, dtype=False)
    return target.to(torch.int64).contiguous()


def cross_entropy(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    inplace_gradient: bool = False,
) -> torch.Tensor:
    """loss = (1 - e) w[y] (-log p[y]) + e / V * sum_j w[j] (-log p[j]) + z_loss * logsumexp(x)^2, p = softmax(x).

    As torch.nn.functional.cross_entropy, except for the keyword-only arguments, and without torch's legacy arguments.
    The backward pass keeps the input and two numbers per row. Results are deterministic.

    Args:
        input: logits, (N, V), with any stride between rows, or (V,); float16, bfloat16 or float32 (float64 in plain
            PyTorch). torch's (N, C, d1, ...) with the classes second is refused: flatten (B, S, V) to (B * S, V).
        target: class indices, (N,) or (), int64, int32 or uint8. Class probabilities are refused.
        weight: (V,) class weights; get no gradient.
        ignore_index: a row with this target has no loss and no gradient.
        reduction: "mean" divides by the sum of w[y] over the rows that are not ignored (NaN if there are none, as in
            torch); "sum"; or "none" for the losses (N,).
        label_smoothing: e, in [0, 1].
        z_loss: pulls logsumexp towards 0. It is reduced like the rest, but not weighted.
        inplace_gradient: let the backward pass overwrite input with the gradient, which saves memory of the size of
            input. Nothing else may use input after that; autograd raises if something does. Ignored under
            torch.compile.

    Returns:
        A scalar, or (N,) for reduction="none"; float32 whatever the dtype of the logits (float64 for float64).

    Raises:
        TypeError, ValueError: if an argument is invalid; the message names it, its value and what is expected. A target
            outside [0, V) raises ValueError on the CPU. On a GPU a check would synchronise, so that row's loss is NaN.

    Source:
        Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; label smoothing: Szegedy et al.,
        "Rethinking the Inception architecture", 2015, section 7; z-loss: Chowdhery et al., "PaLM", 2022, section 5.

    Examples:
        >>> import torch, transformer_fast
        >>> logits, target = torch.randn(4, 1000), torch.tensor([1, 2, -100, 3])
        >>> transformer_fast.cross_entropy(logits, target, label_smoothing=0.1).shape
        torch.Size([])
    """
    _common.check_floating("input", input)
    if input.dim() not in (1, 2):
        raise ValueError(
            f"input: wanted (N, V) or (V,), got {tuple(input.shape)}; flatten leading dimensions with "
            "input.flatten(0, -2) and target.flatten()"
        )
    if input.shape[-1] == 0:
        raise ValueError(f"input: wanted at least one class, got shape {tuple(input.shape)}")
    check_options(ignore_index, reduction, REDUCTIONS, label_smoothing, z_loss)
    _common.check_flag("inplace_gradient", inplace_gradient)
    target = class_indices(target, tuple(input.shape[:-1]), "input", input)
    wide = loss_dtype(input.dtype)
    if weight is not None:
        _common.check_vector("weight", weight, input.shape[-1], input)
        if weight.requires_grad:
            raise ValueError("weight: class weights get no gradient; wanted a tensor that requires none")
        weight = weight.to(wide).contiguous()
    flat, flat_target = (input, target) if input.dim() == 2 else (input[None], target[None])
    options = (ignore_index, float(label_smoothing), float(z_loss))
    if _common.transformed():
        losses = eager.cross_entropy(CrossEntropySpec(flat, flat_target, weight, *options))
    else:
        run = _forward if _common.direct(input) else _op
        losses = run(flat, flat_target, weight, *options, bool(inplace_gradient))[0]
    if reduction == "none":
        return losses if input.dim() == 2 else losses[0]
    total = losses.sum()
    if reduction == "sum":
        return total
    counted = flat_target != ignore_index
    if weight is None:
        return total / counted.sum()
    return total / (weight[flat_target.masked_fill(~counted, 0)] * counted).sum()
