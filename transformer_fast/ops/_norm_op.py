"""The registered norm op: schema, fake kernel, autograd, and the calls of the backend. The public functions are in
ops/norm.py."""

import itertools

import torch

from ..backends import Backend, eager, memory, select
from ..backends.contract import Repeat
from ..backends.philox import keep_mask_2d, keep_scale
from ..backends.specs import NormSpec
from . import _common

# The features of a Call, by (residual, dropout, rms).
_FEATURES = {
    flags: tuple(name for name, on in zip(("add", "dropout", "rms"), flags) if on)
    for flags in itertools.product((False, True), repeat=3)
}


def choose(x, residual, dropout_p, rms) -> Backend:
    features = _FEATURES[residual is not None, dropout_p > 0.0, rms]
    return select(("norm", x.device.type, x.dtype, x.shape[-1], features))


def _rows(t: torch.Tensor) -> torch.Tensor:
    """(rows, width) with unit stride along the width; rows may be strided."""
    if t.dim() != 2:
        t = t.reshape(-1, t.shape[-1])
    return memory.unit_stride(t)


Results = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def run(*args) -> Results:
    """y, the sum, mean and rstd; the last three are None if not needed."""
    return launch(*args)[0]


def launch(*args) -> tuple[Results, Repeat | None]:
    """The results of run, and a function that makes the call again."""
    *fields, need_sum, need_stats = args
    spec = NormSpec(*fields)
    x, residual = spec.x, spec.residual
    chosen = choose(x, residual, spec.dropout_p, spec.rms)
    y = memory.empty_like(x)
    width = x.shape[-1]
    rows = x.numel() // width if width else 0
    total = memory.empty_like(x) if need_sum else None
    mean = memory.empty((rows,), _wide(x), x.device) if need_stats and not spec.rms else None
    rstd = memory.empty((rows,), _wide(x), x.device) if need_stats else None
    repeat = None
    if rows:
        if x.dim() == 2 and x.stride(1) == 1 and (residual is None or residual.stride(1) == 1):
            repeat = chosen.norm_forward(spec, y, total, mean, rstd)
        else:
            repeat = chosen.norm_forward(
                spec._replace(x=_rows(x), residual=None if residual is None else _rows(residual)), y.view(rows, width),
                None if total is None else total.view(rows, width), mean, rstd,
            )  # fmt: skip
    return (y, total, mean, rstd), repeat


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _forward(*args) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As run, with empty tensors in place of None, for torch's dispatcher."""
    y, total, mean, rstd = run(*args)
    return (
        y,
        y.new_empty(0) if total is None else total,
        y.new_empty(0, dtype=_wide(y)) if mean is None else mean,
        y.new_empty(0, dtype=_wide(y)) if rstd is None else rstd,
    )


def _forward_fake(x, residual, weight, bias, rng, eps, rms, dropout_p, need_sum, need_stats):
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    stats = torch.float32 if x.dtype != torch.float64 else x.dtype
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape if need_sum else (0,)),
        x.new_empty((rows if need_stats and not rms else 0,), dtype=stats),
        x.new_empty((rows if need_stats else 0,), dtype=stats),
    )


def _run_backward(*args) -> Results:
    """Gradients of v = residual + dropout(x), of x (None without dropout, where it equals that of v), of weight and of
    bias (None if not needed). The spec's x is v."""
    return launch_backward(*args)[0]


def launch_backward(*args) -> tuple[Results, Repeat | None]:
    """The results of _run_backward, and a function that makes the call again, if it writes exactly these."""
    grad_y, grad_sum, mean, rstd, *fields, need_weight, need_bias = args
    spec = NormSpec(*fields)
    v, weight, dropout_p = spec.x, spec.weight, spec.dropout_p
    chosen = choose(v, None, dropout_p, spec.rms)
    width = v.shape[-1]
    grad_v = memory.empty_like(v)
    grad_x = memory.empty_like(v) if dropout_p else None
    wanted = rstd.dtype if weight is None else weight.dtype
    summed = wanted if chosen.narrows_parameter_gradients else rstd.dtype
    grad_weight = memory.empty((width,), summed, v.device) if need_weight else None
    grad_bias = memory.empty((width,), summed, v.device) if need_bias else None
    rows, repeat = v.numel() // width if width else 0, None
    if rows:
        flat = v.dim() == 2 and v.stride(1) == 1
        repeat = chosen.norm_backward(
            spec if flat else spec._replace(x=_rows(v)),
            _rows(grad_y),
            None if grad_sum is None else _rows(grad_sum),
            mean if mean is not None and mean.numel() else None,
            rstd,
            grad_v if flat else grad_v.view(rows, width),
            grad_x if flat or grad_x is None else grad_x.view(rows, width),
            grad_weight,
            grad_bias,
        )
    else:
        for t in (grad_weight, grad_bias):
            if t is not None:
                t.zero_()
    if summed != wanted:
        repeat = None
        grad_weight, grad_bias = (None if t is None else t.to(wanted) for t in (grad_weight, grad_bias))
    return (grad_v, grad_x, grad_weight, grad_bias), repeat


def _backward_impl(*args) -> tuple[torch.Tensor, ...]:
    """As _run_backward, with empty tensors in place of None, for torch's dispatcher."""
    grad_v, grad_x, *parameters = _run_backward(*args)
    spec = NormSpec(*args[4:-2])
    wanted = args[3].dtype if spec.weight is None else spec.weight.dtype
    empty = (grad_v.new_empty(0, dtype=wanted) if t is None else t for t in parameters)
    return grad_v, grad_v.new_empty(0) if grad_x is None else grad_x, *empty


def _backward_fake(*args):
    _, _, _, rstd, *fields, need_weight, need_bias = args
    spec = NormSpec(*fields)
    v, dtype = spec.x, rstd.dtype if spec.weight is None else spec.weight.dtype
    return (
        v.new_empty(v.shape),
        v.new_empty(v.shape if spec.dropout_p else (0,)),
        v.new_empty((v.shape[-1] if need_weight else 0,), dtype=dtype),
        v.new_empty((v.shape[-1] if need_bias else 0,), dtype=dtype),
    )


_SPEC = _common.schema_of(NormSpec)
_backward_op = _common.define(
    "norm_backward",
    f"(Tensor grad_y, Tensor? grad_sum, Tensor? mean, Tensor rstd, {_SPEC}, bool need_weight, bool need_bias) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
    eager=_run_backward,
)


def _setup(ctx, inputs, output):
    *fields, ctx.need_sum, _ = inputs
    spec = NormSpec(*fields)
    _, total, mean, rstd = output
    ctx.bias_dtype = spec.bias.dtype if spec.bias is not None else None
    _common.save(ctx, spec._replace(x=total if ctx.need_sum else spec.x, residual=None, bias=None), mean, rstd)
    ctx.mark_non_differentiable(*(t for t in (mean, rstd) if t is not None))
    ctx.set_materialize_grads(False)  # an unused sum then has no gradient instead of a tensor of zeros


def backward(ctx, need, grad_y, grad_sum=None, _mean=None, _rstd=None):
    spec, mean, rstd = _common.saved(ctx)
    if grad_y is None:
        grad_y = torch.zeros_like(spec.x)
    if not ctx.need_sum:
        grad_sum = None
    if torch.is_grad_enabled():
        return _differentiable_backward(spec, need, ctx.bias_dtype, grad_y, grad_sum)
    needs = bool(need.weight), bool(need.bias)
    grad_v, grad_x, weight, bias = _backward_op(grad_y, grad_sum, mean, rstd, *spec, *needs)
    return {
        "x": grad_x if spec.dropout_p else grad_v,
        "residual": grad_v,
        "weight": weight,
        "bias": bias.to(ctx.bias_dtype) if need.bias else None,
    }


def _differentiable_backward(spec, need, bias_dtype, grad_y, grad_sum):
    """The same gradients in plain PyTorch, for gradients of gradients."""
    v, width = spec.x, spec.x.shape[-1]
    bias = torch.zeros(width, dtype=bias_dtype, device=v.device, requires_grad=True) if need.bias else None

    def y(v, weight, bias):
        rows = v.reshape(-1, width)
        return (eager.norm(rows, None, weight, bias, None, spec.eps, spec.rms, 0.0)[0].view(v.shape),)

    grad_v, grad_weight, grad_bias = _common.gradients(y, (v, spec.weight, bias), (grad_y,))
    found = {"weight": grad_weight, "bias": grad_bias}
    if grad_v is None:
        return found
    if grad_sum is not None:
        grad_v = grad_v + grad_sum
    grad_x = grad_v
    if spec.dropout_p:
        kept = keep_mask_2d(spec.rng, spec.dropout_p, grad_v.numel() // max(width, 1), width)
        grad_x = grad_v * kept.view(v.shape) * keep_scale(spec.dropout_p)
    return {"x": grad_x, "residual": grad_v, **found}


def plain(input, residual, weight, bias, rng, eps, rms, p):
    """(y, sum) in plain PyTorch, for torch.func transforms."""
    rows, others = (None if t is None else t.reshape(-1, input.shape[-1]) for t in (input, residual))
    y, total, _, _ = eager.norm(rows, others, weight, bias, rng, eps, rms, p)
    return y.view(input.shape), total.view(input.shape)


norm_op = _common.define(
    "norm",
    f"({_SPEC}, bool need_sum, bool need_stats) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_setup,
    backward=backward,
    eager=run,
)
