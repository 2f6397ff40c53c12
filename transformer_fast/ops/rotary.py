"""Rotary position embedding of queries and keys, with one read and one write."""

import torch

from ..backends import Backend, eager, memory, select
from . import _common


def _select(input: torch.Tensor, interleaved: bool) -> Backend:
    features = ("interleaved",) if interleaved else ()
    return select(("rotary_embedding", input.device.type, input.dtype, input.shape[-1], features))


def _table(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return t.detach().to(torch.float64 if like.dtype == torch.float64 else torch.float32).contiguous()


def _forward(
    input: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    interleaved: bool,
    inverse: bool,
) -> torch.Tensor:
    """input: (B, S, H, D); positions: (B, S) or None."""
    y = memory.empty(tuple(input.shape), input.dtype, input.device)
    if y.numel():
        _select(input, interleaved).rotary_embedding(
            memory.unit_stride(input), _table(cos, input), _table(sin, input), positions, interleaved, inverse, y
        )
    return y


def _forward_fake(input, cos, sin, positions, interleaved, inverse):
    return input.new_empty(input.shape)


def _setup(ctx, inputs, output):
    _, cos, sin, positions, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin, positions)


def _backward(ctx, need, grad):
    cos, sin, positions = ctx.saved_tensors
    # The transpose of a rotation is its inverse, which is the same op. So gradients of gradients need no further code.
    return {"input": _op(grad, cos, sin, positions, ctx.interleaved, not ctx.inverse)}


_op = _common.define(
    "rotary_embedding",
    "(Tensor input, Tensor cos, Tensor sin, Tensor? positions, bool interleaved, bool inverse) -> Tensor",
    _forward,
    _forward_fake,
    setup_context=_setup,
    backward=_backward,
)


def rotary_embedding(
    input: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None = None,
    *,
    interleaved: bool = False,
    inverse: bool = False,
) -> torch.Tensor:
    """Rotary position embedding: rotate pairs of columns of each head by angles that depend on the token's position.

    (y1, y2) = (x1 cos - x2 sin, x2 cos + x1 sin) for the pairs of the first R columns. The other columns are copied.

    Args:
        input: (B, S, H, D), or unpadded (total, H, D); float16, bfloat16, float32 or float64, any strides. Queries and
            keys from one fused projection can be rotated in one call, as H query and key heads.
        cos: (P, R / 2), one row per position, R <= D; any floating dtype, used in float32 (float64 for float64 input).
            It gets no gradient.
        sin: as cos.
        positions: int32 or int64, (B, S), (1, S) or (S,); (total,) for unpadded input. The row of cos and sin of each
            token. Default: 0 .. S - 1 in each sequence.
        interleaved: pairs are columns (2 i, 2 i + 1), as in GPT-J; else (i, R / 2 + i), as in GPT-NeoX and Llama.
        inverse: rotate by the negative angles.

    Returns:
        A new contiguous tensor of input's shape and dtype. input gets a gradient.

    Raises:
        TypeError, ValueError: if an argument is invalid; the message names it, its value and what is expected.
            Positions are compared with P on the CPU only.

    Source:
        Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021, section 3.2.

    Examples:
        >>> import torch, transformer_fast
        >>> angles = torch.arange(16)[:, None] * 10000.0 ** -(torch.arange(4) / 4)
        >>> transformer_fast.rotary_embedding(torch.randn(2, 16, 3, 8), angles.cos(), angles.sin()).shape
        torch.Size([2, 16, 3, 8])
    """
    _common.check_floating("input", input)
    if input.dim() not in (3, 4):
        raise ValueError(f"input: wanted (B, S, H, D) or (total, H, D), got shape {tuple(input.shape)}")
    _check_tables(input, cos, sin)
    _common.check_flag("interleaved", interleaved)
    _common.check_flag("inverse", inverse)
    interleaved, inverse = bool(interleaved), bool(inverse)
    tokens = tuple(input.shape[:-2])
    if positions is not None:
        positions = _check_positions(positions, tokens, cos)
    elif tokens[-1] > cos.shape[0]:
        raise ValueError(f"cos: wanted a row for each of the {tokens[-1]} positions, got {cos.shape[0]}")
    if input.dim() == 3:
        positions = None if positions is None else positions[None]
        return _call(input[None], cos, sin, positions, interleaved, inverse)[0]
    return _call(input, cos, sin, positions, interleaved, inverse)


def _call(input, cos, sin, positions, interleaved, inverse):
    if _common.transformed():
        return eager.rotary_embedding(input, cos, sin, positions, interleaved, inverse)
    if not _common.direct(input, cos, sin, positions):
        return _op(input, cos, sin, positions, interleaved, inverse)
    return _forward(input, cos, sin, positions, interleaved, inverse)


def _check_tables(input, cos, sin) -> None:
    for name, t in (("cos", cos), ("sin", sin)):
        _common.check_floating(name, t)
        if t.dim() != 2:
            raise ValueError(f"{name}: wanted shape (positions, R / 2), got {tuple(t.shape)}")
        _common.check_same(name, t, "input", input, dtype=False)
        if t.requires_grad:
            raise ValueError(f"{name}: gets no gradient; pass {name}.detach()")
    if cos.shape != sin.shape:
        raise ValueError(f"sin: wanted the shape of cos {tuple(cos.shape)}, got {tuple(sin.shape)}")
    if 2 * cos.shape[1] > input.shape[-1]:
        raise ValueError(f"cos: wanted at most {input.shape[-1] // 2} columns, half of input's, got {cos.shape[1]}")


def _check_positions(positions, tokens: tuple[int, ...], cos) -> torch.Tensor:
    _common.check_integers("positions", positions)
    _common.check_same("positions", positions, "cos", cos, dtype=False)
    shape = tuple(positions.shape)
    if shape != tokens and shape != (1, tokens[-1]) and shape != tokens[-1:]:
        raise ValueError(f"positions: wanted shape {tokens}, got {shape}")
    if positions.device.type == "cpu" and positions.numel() and _common.concrete(positions):
        low, high = (int(v) for v in positions.aminmax())
        if low < 0 or high >= cos.shape[0]:
            raise ValueError(f"positions: wanted values in [0, {cos.shape[0]}), the rows of cos, got {low}..{high}")
    return positions.to(torch.int64).expand(tokens)
