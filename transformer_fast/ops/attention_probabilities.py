"""Attention weights of chosen heads, for attention kernels that do not store them."""

import math

import torch

from ..backends import memory
from . import _common, _parallel
from ._attention_arguments import (
    RelativeBias,
    check_alignment,
    check_lengths,
    check_qkv,
    check_relative,
    check_softcap,
    check_window,
    scale_or_default,
    split_mask,
)

__all__ = ["attention_probabilities"]


def attention_probabilities(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    *,
    scale: float | None = None,
    heads: list[int] | None = None,
    bias: torch.Tensor | None = None,
    attn_mask: torch.Tensor | None = None,
    key_lengths: torch.Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: str = "top_left",
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    relative_bias: RelativeBias | None = None,
) -> torch.Tensor:
    """softmax(scale * Q K^T + bias): the attention weights of chosen heads, after a call of
    scaled_dot_product_attention.

    All arguments but `heads` must be those of that call.

    Args:
        query: (B, H, Sq, D).
        key: (B, Hk, Sk, D), query's dtype.
        lse: (B, H, Sq) float32, as that call returned it. Where it is -inf the weights are zero.
        scale: default 1 / sqrt(D).
        heads: indices of the heads to compute; default all.
        bias: float, broadcasts to (B, H, Sq, Sk).
        attn_mask: bool or float, broadcasts to (B, H, Sq, Sk).
        key_lengths: (B,) int32 or int64.
        is_causal: bool.
        causal_alignment: "top_left" or "bottom_right".
        window: (left, right).
        softcap: c > 0; 0 is off.
        relative_bias: T5's relative position bias.

    Returns:
        (B, len(heads), Sq, Sk) in query's dtype, before dropout, differentiable. Rows without keys to attend to are
        zero.

    Raises:
        TypeError, ValueError: if an argument is invalid; the message names it, its value and what is expected.

    Source:
        As scaled_dot_product_attention.

    Examples:
        >>> import torch, transformer_fast
        >>> q, k, v = torch.randn(3, 2, 8, 16, 64).unbind()
        >>> out, lse = transformer_fast.scaled_dot_product_attention(q, k, v, return_lse=True)
        >>> transformer_fast.attention_probabilities(q, k, lse, heads=[0, 3]).shape
        torch.Size([2, 2, 16, 16])
    """
    _parallel.refuse("attention_probabilities", "compute them with whole sequences")
    for name, t in (("query", query), ("key", key)):
        _common.check_floating(name, t)
        if t.dim() != 4:
            raise ValueError(f"{name}: wanted 4 dimensions (B, H, S, D), got shape {tuple(t.shape)}")
    check_qkv(query, key, key)
    b, h, sq, d = query.shape
    sk = key.shape[2]
    if key.shape[0] != b:
        raise ValueError(f"key: wanted batch {b} as query has, got {key.shape[0]}")
    _common.check_floating("lse", lse)
    _common.check_same("lse", lse, "query", query, dtype=False)
    if lse.shape != (b, h, sq):
        raise ValueError(f"lse: wanted shape {(b, h, sq)}, got {tuple(lse.shape)}")
    check_alignment(causal_alignment)
    _common.check_flag("is_causal", is_causal)
    check_softcap(softcap)
    softcap = float(softcap)
    mask, bias = split_mask(attn_mask, bias, (b, h, sq, sk), query)
    left, right = check_window(window)
    if is_causal:
        right = 0
    table, distance, bidirectional = check_relative(relative_bias, query)
    if key_lengths is not None:
        check_lengths("key_lengths", key_lengths, b, sk, query)
    if heads is not None and not isinstance(heads, (list, tuple)):
        raise TypeError(f"heads: wanted a list of indices or None, got {type(heads).__name__}")
    chosen = list(range(h)) if heads is None else list(heads)
    for i in chosen:
        _common.check_integer("heads", i, 0, h - 1)
    if heads is not None:
        query, lse = query[:, chosen], lse[:, chosen]
        bias, mask = (t if t is None or t.shape[1] == 1 else t[:, chosen] for t in (bias, mask))
    if heads is not None or key.shape[1] != h:
        key = key[:, [i // (h // key.shape[1]) for i in chosen]]

    column = torch.arange(sk, device=query.device)
    position = torch.arange(sq, device=query.device)[:, None]
    if causal_alignment == "bottom_right":
        position = position + ((sk if key_lengths is None else key_lengths.view(-1, 1, 1, 1)) - sq)
    # In float32 at least: products rounded to 16 bits would differ from those that the output was computed from.
    dtype, wide = query.dtype, torch.promote_types(query.dtype, torch.float32)
    query, key = (memory.unit_stride(t.to(wide)) for t in (query, key))
    # bmm on flattened heads keeps the keys as rows. matmul would make a transposed copy of them, and for few rows MKL's
    # dot products are more accurate than its product with that copy.
    scores = torch.bmm(query.flatten(0, 1), key.flatten(0, 1).transpose(-1, -2)).view(b, len(chosen), sq, sk)
    scores = scores * scale_or_default(scale, d)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    if table is not None:
        # Convert first: the gradient of the table is a sum over all pairs of positions, too long for 16 bits.
        relative = RelativeBias(table[:, chosen].to(wide), distance, bidirectional)
        rows = position.expand(b, 1, sq, 1).reshape(-1)  # per sequence, as key lengths may shift the positions
        scores = scores + relative.matrix(rows, sk)[0].unflatten(1, (b, sq)).transpose(0, 1)
    dead = (lse == -math.inf).unsqueeze(-1)
    if left >= 0:
        dead = dead | (column < position - left)
    if right >= 0:
        dead = dead | (column > position + right)
    if key_lengths is not None:
        dead = dead | (column >= key_lengths.view(-1, 1, 1, 1))
    if mask is not None:
        dead = dead | ~mask
    # Not exp(scores - lse): the gradients through scores and through lse would nearly cancel, after separate rounding.
    empty = dead.all(-1, keepdim=True)
    p = torch.softmax(scores.masked_fill(dead, -math.inf).masked_fill(empty, 0.0), -1)
    return p.masked_fill(dead, 0.0).to(dtype)
