"""layer_norm and rms_norm, alone and fused with the dropout and residual addition before them."""

import numbers

import torch

from ..backends import remembered
from ..backends.philox import threshold
from . import _common
from ._norm_known import keeps, remember
from ._norm_op import norm_op, plain, run


def _norm(input, residual, weight, bias, eps, rms, p, need_sum, generator):
    """Checks, dtype promotion and the dropout seed; then the kernel, without torch's dispatcher where possible. A call
    like an earlier one is launched at once."""
    signature = None
    if type(p) is float and type(eps) is float:
        signature = _common.signature((input, residual, weight, bias), eps, rms, need_sum, p)
        if signature is not None:
            known = remembered.find(signature)
            if known is not None:
                rng = _common.draw_rng(input.device, generator) if p else None
                return known(input, residual, weight, bias, rng)
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
            input, residual, signature = input.to(wide), residual.to(wide), None
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.dtype == torch.float64 and input.dtype != torch.float64:
            raise TypeError(f"{name}: has dtype torch.float64 but input has {input.dtype}; wanted the same or float32")
    rng = None
    if type(p) is not float or p != 0.0:
        _common.check_probability("dropout_p", p)
        if p == 1.0:  # the kernels do not handle p = 1
            input, p, signature = input * 0, 0.0, None
        if not threshold(p):
            p, signature = 0.0, None
        if p:
            rng = _common.draw_rng(input.device, generator)
    if _common.transformed():
        return plain(input, residual, weight, bias, rng, eps, rms, p)
    if signature is not None and input.numel():
        return remember(signature, input, residual, weight, bias, rng, eps, rms, p, need_sum)
    if _common.direct(input, residual, weight, bias):
        return run(input, residual, weight, bias, rng, eps, rms, p, need_sum, False)
    return norm_op(input, residual, weight, bias, rng, eps, rms, p, keeps(residual, p, need_sum), True)


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
