"""Input projections, attention and output projection in one function, without transposed copies."""

from typing import Any

import torch

from . import _common
from .attention import qkv_attention, scaled_dot_product_attention
from .linear import linear


def multi_head_attention(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    num_heads: int,
    in_proj_weight: torch.Tensor,
    in_proj_bias: torch.Tensor | None,
    out_proj_weight: torch.Tensor,
    out_proj_bias: torch.Tensor | None,
    *,
    attn_mask: torch.Tensor | None = None,
    key_lengths: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """concat_h(softmax(scale * Q_h K_h^T) V_h) W_o + b_o, with Q, K, V = x W_q, x W_k, x W_v.

    Args:
        query: (B, Sq, E), float16, bfloat16 or float32 (float64 in plain PyTorch).
        key: (B, Sk, E), query's dtype; None for self-attention, which then uses one product for query, key and value.
        value: (B, Sk, E), query's dtype; None: key.
        num_heads: a divisor of E.
        in_proj_weight: (3E, E), in the order of torch.nn.MultiheadAttention.in_proj_weight.
        in_proj_bias: (3E,) or None.
        out_proj_weight: (E, E).
        out_proj_bias: (E,) or None.
        attn_mask: bool or float, broadcasts to (B, num_heads, Sq, Sk); as in scaled_dot_product_attention.
        key_lengths: (B,) int32 or int64; keys at and after this position do not take part.
        dropout_p: dropout probability of the attention weights.
        is_causal: each token attends only to itself and the tokens before it.
        scale: default 1 / sqrt(E / num_heads).

    Returns:
        (B, Sq, E) in query's dtype. All tensors get gradients.

    Raises:
        TypeError, ValueError: if an argument is invalid; the message names it, its value and what is expected.

    Source:
        Vaswani et al., "Attention Is All You Need", 2017, section 3.2.2.

    Examples:
        >>> import torch, transformer_fast
        >>> x, weight, out = torch.randn(2, 5, 32), torch.randn(96, 32), torch.randn(32, 32)
        >>> transformer_fast.multi_head_attention(x, None, None, 4, weight, None, out, None).shape
        torch.Size([2, 5, 32])
    """
    t: Any
    for name, t in (("query", query), ("key", key), ("value", value)):
        if t is None and name != "query":
            continue
        _common.check_floating(name, t)
        if t.dim() != 3:
            raise ValueError(f"{name}: wanted 3 dimensions (B, S, E), got shape {tuple(t.shape)}")
        _common.check_same(name, t, "query", query, dtype=_common.autocast_dtype(query.device) is None)
        if t.shape[0] != query.shape[0] or t.shape[2] != query.shape[2]:
            raise ValueError(
                f"{name}: wanted batch {query.shape[0]} and width {query.shape[2]} as query has, got shape "
                f"{tuple(t.shape)}"
            )
    b, sq, e = query.shape
    keys = query if key is None else key
    if value is not None and value.shape[1] != keys.shape[1]:
        raise ValueError(f"value: wanted {keys.shape[1]} positions as key has, got {value.shape[1]}")
    _common.check_integer("num_heads", num_heads, 1)
    if e % num_heads:
        raise ValueError(f"num_heads: wanted a divisor of the width {e}, got {num_heads}")
    for name, t, shape in (
        ("in_proj_weight", in_proj_weight, (3 * e, e)), ("in_proj_bias", in_proj_bias, (3 * e,)),
        ("out_proj_weight", out_proj_weight, (e, e)), ("out_proj_bias", out_proj_bias, (e,)),
    ):  # fmt: skip
        if t is None and name.endswith("bias"):
            continue
        _common.check_floating(name, t)
        if tuple(t.shape) != shape:
            raise ValueError(f"{name}: wanted shape {shape}, got {tuple(t.shape)}")
        _common.check_same(name, t, "query", query, dtype=_common.autocast_dtype(query.device) is None)
    d = e // num_heads
    if key is None and value is None and attn_mask is None:
        qkv = linear(query, in_proj_weight, in_proj_bias).view(b, sq, 3, num_heads, d)
        out = qkv_attention(qkv, None, None, dropout_p, is_causal, scale, key_lengths=key_lengths)
        return linear(out.reshape(b, sq, e), out_proj_weight, out_proj_bias)
    key = query if key is None else key
    value = key if value is None else value
    weights = in_proj_weight.chunk(3)
    biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
    if key is value:  # one GEMM for both
        q = linear(query, weights[0], biases[0]).view(b, sq, num_heads, d)
        kv = linear(key, in_proj_weight[e:], None if in_proj_bias is None else in_proj_bias[e:])
        k, v = kv.view(b, key.shape[1], 2, num_heads, d).unbind(2)
    else:
        q, k, v = (
            linear(x, w, c).view(b, x.shape[1], num_heads, d) for x, w, c in zip((query, key, value), weights, biases)
        )
    out = scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask, dropout_p, is_causal, scale,
        key_lengths=key_lengths,
    )  # fmt: skip
    return linear(out.transpose(1, 2).reshape(b, sq, e), out_proj_weight, out_proj_bias)
