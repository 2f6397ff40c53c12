"""layer_norm and rms_norm, alone and fused with the dropout and residual addition before them."""

import itertools
import numbers

import torch

from ..backends import Backend, eager, memory, select
from ..backends.philox import keep_mask_2d, keep_scale, threshold
from ..backends.specs import NormSpec
from . import _common

# The features of a Call, by (residual, dropout, rms).
_FEATURES = {
    flags: tuple(name for name, on in zip(("add", "dropout", "rms"), flags) if on)
    for flags in itertools.product((False, True), repeat=3)
}


def _select(x, residual, dropout_p, rms) -> Backend:
    features = _FEATURES[residual is not None, dropout_p > 0.0, rms]
    return select(("norm", x.device.type, x.dtype, x.shape[-1], features))


def _rows(t: torch.Tensor) -> torch.Tensor:
    """(rows, width) with unit stride along the width; rows may be strided."""
    if t.dim() != 2:
        t = t.reshape(-1, t.shape[-1])
    return memory.unit_stride(t)


def _run(*args) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """y, the sum, mean and rstd; the last three are None if not needed."""
    *fields, need_sum, need_stats = args
    spec = NormSpec(*fields)
    x, residual = spec.x, spec.residual
    chosen = _select(x, residual, spec.dropout_p, spec.rms)
    y = memory.empty_like(x)
    width = x.shape[-1]
    rows = x.numel() // width if width else 0
    total = memory.empty_like(x) if need_sum else None
    mean = memory.empty((rows,), _wide(x), x.device) if need_stats and not spec.rms else None
    rstd = memory.empty((rows,), _wide(x), x.device) if need_stats else None
    if rows:
        if x.dim() == 2 and x.stride(1) == 1 and (residual is None or residual.stride(1) == 1):
            chosen.norm_forward(spec, y, total, mean, rstd)
        else:
            chosen.norm_forward(
                spec._replace(x=_rows(x), residual=None if residual is None else _rows(residual)), y.view(rows, width),
                None if total is None else total.view(rows, width), mean, rstd,
            )  # fmt: skip
    return y, total, mean, rstd


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _forward(*args) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As _run, with empty tensors in place of None, for torch's dispatcher."""
    y, total, mean, rstd = _run(*args)
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


def _run_backward(*args) -> tuple[torch.Tensor | None, ...]:
    """Gradients of v = residual + dropout(x), of x (None without dropout, where it equals that of v), of weight and of
    bias (None if not needed). The spec's x is v."""
    grad_y, grad_sum, mean, rstd, *fields, need_weight, need_bias = args
    spec = NormSpec(*fields)
    v, weight, dropout_p = spec.x, spec.weight, spec.dropout_p
    chosen = _select(v, None, dropout_p, spec.rms)
    width = v.shape[-1]
    grad_v = memory.empty_like(v)
    grad_x = memory.empty_like(v) if dropout_p else None
    wanted = rstd.dtype if weight is None else weight.dtype
    summed = wanted if chosen.narrows_parameter_gradients else rstd.dtype
    grad_weight = memory.empty((width,), summed, v.device) if need_weight else None
    grad_bias = memory.empty((width,), summed, v.device) if need_bias else None
    rows = v.numel() // width if width else 0
    if rows:
        flat = v.dim() == 2 and v.stride(1) == 1
        chosen.norm_backward(
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
        grad_weight, grad_bias = (None if t is None else t.to(wanted) for t in (grad_weight, grad_bias))
    return grad_v, grad_x, grad_weight, grad_bias


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


def _backward(ctx, need, grad_y, grad_sum, _mean, _rstd):
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


def _plain(input, residual, weight, bias, rng, eps, rms, p):
    """(y, sum) in plain PyTorch, for torch.func transforms."""
    rows, others = (None if t is None else t.reshape(-1, input.shape[-1]) for t in (input, residual))
    y, total, _, _ = eager.norm(rows, others, weight, bias, rng, eps, rms, p)
    return y.view(input.shape), total.view(input.shape)


_op = _common.define(
    "norm",
    f"({_SPEC}, bool need_sum, bool need_stats) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_setup,
    backward=_backward,
    eager=_run,
)


def _norm(input, residual, weight, bias, eps, rms, p, need_sum, generator):
    """Checks, dtype promotion and the dropout seed; then the kernel, without torch's dispatcher where possible."""
    _common.check_floating("input", input)
    if input.dim() == 0:
        raise ValueError("input: wanted at least one dimension, got a scalar")
    width = input.shape[-1]
    if weight is not None:
        _common.check_vector("weight", weight, width, input)
    if bias is not None:
        _common.check_vector("bias", bias, width, input)
    _common.check_number("eps", eps, 0.0)
    if residual is not None:
        _common.check_floating("residual", residual)
        if residual.device != input.device:
            _common.check_same("residual", residual, "input", input, dtype=False)
        if residual.shape != input.shape:
            raise ValueError(f"residual: wanted the shape of input {tuple(input.shape)}, got {tuple(residual.shape)}")
        if residual.dtype != input.dtype:
            wide = torch.promote_types(input.dtype, residual.dtype)
            input, residual = input.to(wide), residual.to(wide)
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.dtype == torch.float64 and input.dtype != torch.float64:
            raise TypeError(f"{name}: has dtype torch.float64 but input has {input.dtype}; wanted the same or float32")
    rng = None
    if type(p) is not float or p != 0.0:
        _common.check_probability("dropout_p", p)
        if p == 1.0:  # the kernels do not handle p = 1
            input, p = input * 0, 0.0
        p = p if threshold(p) else 0.0
        if p:
            rng = _common.draw_rng(input.device, generator)
    if _common.transformed():
        return _plain(input, residual, weight, bias, rng, eps, rms, p)
    if _common.direct(input, residual, weight, bias):
        if input.is_contiguous() and (residual is None or residual.is_contiguous()) and input.numel():
            chosen = _select(input, residual, p, rms)
            if chosen.name == "cpu":
                return chosen.norm(input, residual, weight, bias, rng, eps, rms, p, need_sum)
        return _run(input, residual, weight, bias, rng, eps, rms, p, need_sum, False)
    # The backward pass needs v = residual + dropout(x). Without residual and dropout that is x itself.
    keep = need_sum or residual is not None or p > 0
    return _op(input, residual, weight, bias, rng, eps, rms, p, keep, True)


def _normalized(input: torch.Tensor, normalized_shape, weight, bias):
    """Flatten the dimensions of normalized_shape, which may be several as in torch, into one."""
    shape = normalized_shape if isinstance(normalized_shape, (tuple, list)) else (normalized_shape,)
    for n in shape:
        if not isinstance(n, (int, torch.SymInt, numbers.Integral)):
            raise TypeError(f"normalized_shape: wanted an integer or a tuple of them, got {type(n).__name__}")
    shape = tuple(shape)
    if len(shape) == 1 and input.shape[-1:] == shape:
        return input, weight, bias
    if not shape or tuple(input.shape[-len(shape) :]) != shape:
        raise ValueError(f"normalized_shape: {shape} must equal the last dimensions of input {tuple(input.shape)}")
    if len(shape) == 1:
        return input, weight, bias
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            _common.check_floating(name, t)
        if t is not None and tuple(t.shape) != shape:
            raise ValueError(f"{name}: wanted shape {shape}, got {tuple(t.shape)}")
    flat = [None if t is None else t.reshape(-1) for t in (weight, bias)]
    return input.flatten(input.dim() - len(shape)), *flat


def layer_norm(
    input: torch.Tensor,
    normalized_shape,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """y = weight * (x - mean(x)) / sqrt(var(x) + eps) + bias over the last dimensions.

    Same signature as torch.nn.functional.layer_norm. Statistics are always float32.

    Args:
        input: (..., *normalized_shape), float16, bfloat16 or float32 (float64 in plain PyTorch).
        normalized_shape: an int or a sequence of ints.
        weight: tensor of shape normalized_shape, input's dtype or float32.
        bias: as weight.
        eps: added to the variance.

    Returns:
        A tensor of input's shape and dtype. input, weight and bias get gradients, which are deterministic.

    Raises:
        TypeError, ValueError: if an argument is invalid; the message names it, its value and what is expected.

    Source:
        Ba et al., "Layer Normalization", 2016.

    Examples:
        >>> import torch, transformer_fast
        >>> transformer_fast.layer_norm(torch.randn(4, 768), 768, torch.ones(768), torch.zeros(768)).shape
        torch.Size([4, 768])
    """
    _common.check_tensor("input", input)
    x, w, b = _normalized(input, normalized_shape, weight, bias)
    y = _norm(x, None, w, b, eps, False, 0.0, False, None)[0]
    return y if x is input else y.view(input.shape)


def rms_norm(
    input: torch.Tensor, normalized_shape, weight: torch.Tensor | None = None, eps: float | None = None
) -> torch.Tensor:
    """y = weight * x / sqrt(mean(x^2) + eps) over the last dimensions.

    Same signature as torch.nn.functional.rms_norm. Statistics are always float32.

    Args:
        input: (..., *normalized_shape), float16, bfloat16 or float32 (float64 in plain PyTorch).
        normalized_shape: an int or a sequence of ints.
        weight: tensor of shape normalized_shape, input's dtype or float32.
        eps: added to the mean square; None: torch.finfo(input.dtype).eps.

    Returns:
        A tensor of input's shape and dtype. input and weight get gradients, which are deterministic.

    Raises:
        TypeError, ValueError: if an argument is invalid; the message names it, its value and what is expected.

    Source:
        Zhang and Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019.

    Examples:
        >>> import torch, transformer_fast
        >>> transformer_fast.rms_norm(torch.randn(4, 768), 768, torch.ones(768), 1e-6).shape
        torch.Size([4, 768])
    """
    _common.check_floating("input", input)
    x, w, _ = _normalized(input, normalized_shape, weight, None)
    y = _norm(x, None, w, None, torch.finfo(input.dtype).eps if eps is None else eps, True, 0.0, False, None)[0]
    return y if x is input else y.view(input.shape)


def add_layer_norm(
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    return_sum: bool = True,
    generator: torch.Generator | None = None,
):
    """s = residual + dropout(x); y = layer_norm(s), in one pass.

    Args:
        input: (..., N), float16, bfloat16 or float32 (float64 in plain PyTorch).
        residual: the shape of input; if the dtypes differ, both are promoted.
        weight: (N,), input's dtype or float32.
        bias: (N,), input's dtype or float32.
        eps: added to the variance.
        dropout_p: dropout probability in [0, 1]; 0 in evaluation.
        return_sum: also return s.
        generator: the torch.Generator from which dropout draws its seed.

    Returns:
        (y, s), or y alone with return_sum=False, in input's shape and the promoted dtype. All tensors get gradients,
        which are deterministic.

    Raises:
        TypeError, ValueError: if an argument is invalid; the message names it, its value and what is expected.

    Source:
        The residual blocks of Vaswani et al., "Attention Is All You Need", 2017, section 3.1.

    Examples:
        >>> import torch, transformer_fast
        >>> x, residual = torch.randn(2, 4, 768).unbind()
        >>> y, residual = transformer_fast.add_layer_norm(x, residual, torch.ones(768), torch.zeros(768), dropout_p=0.1)
    """
    out = _norm(input, residual, weight, bias, eps, False, dropout_p, return_sum, generator)
    return (out[0], out[1]) if return_sum else out[0]


def add_rms_norm(
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    dropout_p: float = 0.0,
    return_sum: bool = True,
    generator: torch.Generator | None = None,
):
    """s = residual + dropout(x); y = rms_norm(s), in one pass.

    Args:
        input: (..., N), float16, bfloat16 or float32 (float64 in plain PyTorch).
        residual: the shape of input; if the dtypes differ, both are promoted.
        weight: (N,), input's dtype or float32.
        eps: added to the mean square.
        dropout_p: dropout probability in [0, 1]; 0 in evaluation.
        return_sum: also return s.
        generator: the torch.Generator from which dropout draws its seed.

    Returns:
        (y, s), or y alone with return_sum=False, in input's shape and the promoted dtype. All tensors get gradients,
        which are deterministic.

    Raises:
        TypeError, ValueError: if an argument is invalid; the message names it, its value and what is expected.

    Source:
        Zhang and Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019; the residual blocks of Raffel et al.,
        "Exploring the Limits of Transfer Learning", 2020, section 2.1.

    Examples:
        >>> import torch, transformer_fast
        >>> x, residual = torch.randn(2, 4, 768).unbind()
        >>> y, residual = transformer_fast.add_rms_norm(x, residual, torch.ones(768))
    """
    out = _norm(input, residual, weight, None, eps, True, dropout_p, return_sum, generator)
    return (out[0], out[1]) if return_sum else out[0]
