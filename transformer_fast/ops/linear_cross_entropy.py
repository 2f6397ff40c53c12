"""Cross entropy of a linear layer, computed in chunks of rows, so that the full logits never exist."""

import torch
import torch.nn.functional as F

from ..backends import eager, memory
from ..backends.specs import CrossEntropySpec
from . import _common
from .cross_entropy import check_options, check_targets, class_indices, loss_dtype, select_backend

# Size of one chunk of logits: about a CPU's last-level cache; on a GPU enough rows to fill the GPU.
_CHUNK_BYTES = {"cpu": 2**25, "cuda": 2**28}
_NAMES = ("hidden", "weight", "bias")
_FEWEST_ROWS = 128  # with fewer rows the GEMMs slow down


def _rows_of_a_chunk(rows: int, classes: int, itemsize: int, device: str, wanted: int) -> int:
    if wanted:
        return min(wanted, rows)
    most = max(_FEWEST_ROWS, _CHUNK_BYTES.get(device, _CHUNK_BYTES["cpu"]) // (classes * itemsize))
    chunks = -(-rows // most)
    return -(-rows // chunks)


def _forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    ignore_index: int,
    mean: bool,
    label_smoothing: float,
    z_loss: float,
    chunk_rows: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss, its gradients of hidden, weight and bias (empty where not needed), and a scale by which the backward
    pass multiplies these gradients. They are computed here because the logits exist only here."""
    (rows, width), classes, dtype, device = hidden.shape, weight.shape[0], hidden.dtype, hidden.device
    wide = loss_dtype(dtype)
    check_targets(target, classes, ignore_index)
    counted = target != ignore_index
    index = None  # indices of the rows that are not ignored; in masked language modelling one in seven
    if device.type == "cpu" and not counted.all():
        index = counted.nonzero().squeeze(1)
        target = target[index]
    count = counted.sum()
    scale = torch.ones((), dtype=wide, device=device)
    if mean:
        scale = torch.where(count > 0, 1.0 / count.to(wide), torch.zeros_like(scale))
    # In float16 the gradient of one row of a mean would underflow, so the scale is applied last, with the loss scale.
    late = dtype == torch.float16
    used = rows if index is None else len(index)
    row_grads = (torch.ones_like(scale) if late else scale).expand(used).contiguous()
    losses, largest, sums = (memory.empty((used,), wide, device) for _ in range(3))
    grad_hidden = memory.empty((rows, width) if need_hidden else (0,), dtype, device)
    # In float32 at least, as these are sums over all chunks.
    if need_weight and device.type == "cpu":
        grad_weight = memory.empty_gradient(weight, (classes, width), wide)
    else:
        grad_weight = memory.empty((classes, width) if need_weight else (0,), wide, device)
    grad_bias = torch.zeros((classes if need_bias else 0,), dtype=wide, device=device)
    if need_weight and not used:
        grad_weight.zero_()
    if need_hidden and index is not None:
        grad_hidden.zero_()
    chunk = _rows_of_a_chunk(used, classes, dtype.itemsize, device.type, chunk_rows) if used else 1
    buffer = memory.empty((chunk if used else 0, classes), dtype, device)
    run = select_backend(buffer)
    for begin in range(0, used, chunk):
        part = slice(begin, min(begin + chunk, used))
        x = hidden[part] if index is None else hidden[index[part]]
        logits = buffer[: part.stop - begin]
        if bias is None:
            torch.mm(x, weight.t(), out=logits)
        else:
            torch.addmm(bias, x, weight.t(), out=logits)
        spec = CrossEntropySpec(logits, target[part], None, ignore_index, label_smoothing, z_loss)
        run.cross_entropy_forward(spec, losses[part], largest[part], sums[part])
        if not (need_hidden or need_weight or need_bias):
            continue
        run.cross_entropy_backward(spec, row_grads[part], largest[part], sums[part], logits)
        if need_hidden and index is None:
            torch.mm(logits, weight, out=grad_hidden[part])
        elif need_hidden and index is not None:
            grad_hidden[index[part]] = torch.mm(logits, weight)
        if need_weight and dtype == wide:
            torch.addmm(grad_weight, logits.t(), x, beta=1 if begin else 0, out=grad_weight)
        elif need_weight:
            grad_weight.add_(torch.mm(logits.t(), x)) if begin else grad_weight.copy_(torch.mm(logits.t(), x))
        if need_bias:
            grad_bias.add_(logits.sum(0, dtype=wide))
    total = losses.sum()
    loss = total / count if mean else total
    if not late:
        grad_weight, grad_bias, scale = grad_weight.to(dtype), grad_bias.to(dtype), torch.ones_like(scale)
    return loss, grad_hidden, grad_weight, grad_bias, scale


def _forward_fake(
    hidden, weight, bias, target, ignore_index, mean, label_smoothing, z_loss, chunk_rows, need_hidden, need_weight,
    need_bias,
):  # fmt: skip
    wide = loss_dtype(hidden.dtype)
    sums = wide if hidden.dtype == torch.float16 else hidden.dtype
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        hidden.new_empty(weight.shape if need_weight else (0,), dtype=sums),
        hidden.new_empty((weight.shape[0] if need_bias else 0,), dtype=sums),
        hidden.new_empty((), dtype=wide),
    )


def _plain(hidden, weight, bias, target, ignore_index, mean, label_smoothing, z_loss):
    """The loss in plain PyTorch with full logits, for gradients of gradients and torch.func transforms."""
    spec = CrossEntropySpec(F.linear(hidden, weight, bias), target, None, ignore_index, label_smoothing, z_loss)
    total = eager.cross_entropy(spec).sum()
    return total / (target != ignore_index).sum() if mean else total


def _setup(ctx, inputs, output):
    ctx.dtype, ctx.options = inputs[0].dtype, inputs[4:8]
    # The inputs are saved for gradients of gradients only. This costs no memory, as the caller holds them anyway.
    ctx.save_for_backward(*inputs[:4], *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, need, grad_loss, *_):
    hidden, weight, bias, target, *grads, scale = ctx.saved_tensors
    if torch.is_grad_enabled():

        def loss(hidden, weight, bias):
            return (_plain(hidden, weight, bias, target, *ctx.options),)

        return dict(zip(_NAMES, _common.gradients(loss, (hidden, weight, bias), (grad_loss,))))
    factor = grad_loss * scale
    # loss.backward() starts with a gradient of 1. On a CPU checking for it is free.
    one = (
        factor.device.type == "cpu" and _common.direct(factor) and not _common.batched(factor) and factor.item() == 1.0
    )
    found = [(grad if one else grad * factor).to(ctx.dtype) for grad in grads]
    return dict(zip(_NAMES, found))


_op = _common.define(
    "linear_cross_entropy",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, int ignore_index, bool mean, float label_smoothing, "
    "float z_loss, int chunk_rows, bool need_hidden, bool need_weight, bool need_bias) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_setup,
    backward=_backward,
)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    chunk_rows: int | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> torch.Tensor:
    """cross_entropy(hidden W^T + b, target) without the (N, V) logits, for language-model heads that need only the
    loss.

    The gradients of hidden, weight and bias are computed together with the loss, chunk by chunk, and kept for the
    backward pass. Peak memory is one chunk of logits on top of these gradients. On the CPU, ignored rows are left out
    of the matrix products. Results are deterministic.

    Args:
        hidden: (..., D), float16, bfloat16 or float32 (float64 in plain PyTorch). Under autocast hidden, weight and
            bias are cast as by torch.nn.functional.linear.
        weight: (V, D), hidden's dtype.
        target: class indices with hidden's leading dimensions, int64, int32 or uint8.
        bias: (V,), hidden's dtype.
        chunk_rows: rows per chunk of logits (default: about 32 MB of logits; on a GPU 256 MB).
        ignore_index: a row with this target has no loss and no gradient.
        reduction: "mean" over the rows that are not ignored, or "sum".
        label_smoothing: in [0, 1], as in cross_entropy.
        z_loss: pulls logsumexp towards 0, as in cross_entropy.

    Returns:
        A float32 scalar (float64 for float64).

    Raises:
        TypeError, ValueError: if an argument is invalid; the message names it, its value and what is expected.

    Source:
        Hsu et al., "Liger Kernel", 2024, section 3.2 (fused linear cross entropy).

    Examples:
        >>> import torch, transformer_fast
        >>> hidden, weight, target = torch.randn(4, 16), torch.randn(1000, 16), torch.randint(1000, (4,))
        >>> transformer_fast.linear_cross_entropy(hidden, weight, target).shape
        torch.Size([])
    """
    _common.check_floating("hidden", hidden)
    _common.check_floating("weight", weight)
    if hidden.dim() == 0:
        raise ValueError("hidden: wanted at least one dimension, got a scalar")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or not weight.shape[0]:
        raise ValueError(f"weight: wanted (V, {hidden.shape[-1]}) with V > 0, got {tuple(weight.shape)}")
    _common.check_vector("bias", bias, weight.shape[0], weight)
    check_options(ignore_index, reduction, ("mean", "sum"), label_smoothing, z_loss)
    if chunk_rows is not None:
        _common.check_integer("chunk_rows", chunk_rows, 1)
        chunk_rows = min(chunk_rows, 2**62)
    target = class_indices(target, tuple(hidden.shape[:-1]), "hidden", hidden)
    dtype = _common.autocast_dtype(hidden.device)
    if dtype is not None and hidden.dtype != torch.float64:
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            _common.check_same(name, t, "hidden", hidden)
    flat, flat_target = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)
    options = (ignore_index, reduction == "mean", float(label_smoothing), float(z_loss))
    if _common.transformed():
        return _plain(flat, weight, bias, flat_target, *options)
    direct = _common.direct(hidden, weight, bias)
    need = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    run = _forward if direct else _op
    return run(flat, weight, bias, flat_target, *options, chunk_rows or 0, *need)[0]
