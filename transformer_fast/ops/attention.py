"""Attention: one op for self-, cross- and causal attention and decoding, padded (B, H, S, D) or unpadded (total, H,
D)."""

import math

import torch

from ..backends import remembered
from ..backends.specs import AttentionSpec
from . import _attention_direct as _direct
from . import _common, _parallel
from ._attention_arguments import (
    RelativeBias,
    autocast,
    autocasts,
    check_alignment,
    check_cu_seqlens,
    check_head_dim,
    check_lengths,
    check_qkv,
    check_relative,
    check_softcap,
    check_window,
    dropout_state,
    readable,
    scale_or_default,
    split_mask,
)
from ._attention_known import remember, remember_qkv
from ._attention_op import (
    CAUSAL,
    QkvSpec,
    attention_op,
    choose,
    forward_impl,
    plain,
    qkv_attention_op,
    qkv_forward_impl,
    qkv_plain,
)
from ._attention_shapes import shaped


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    bias: torch.Tensor | None = None,
    key_lengths: torch.Tensor | None = None,
    causal_alignment: str = "top_left",
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    relative_bias: RelativeBias | None = None,
    return_lse: bool = False,
    generator: torch.Generator | None = None,
):
    """softmax(scale * Q K^T + bias) V, with memory linear in the sequence length.

    Same signature as torch.nn.functional.scaled_dot_product_attention, plus the keywords after `*`.

    Args:
        query: (B, H, Sq, D), float16, bfloat16 or float32 (float64 in plain PyTorch), any strides; D in 1..256. As in
            torch, leading dimensions broadcast, and there may be fewer or more: (S, D), (N, S, D), (..., H, S, D).
        key: (B, Hk, Sk, D), query's dtype. Hk < H needs enable_gqa and H % Hk == 0, or Hk = 1.
        value: (B, Hk, Sk, Dv), query's dtype; Dv in 1..256.
        attn_mask: broadcasts to (B, H, Sq, Sk); bool (True takes part) or float (added to the scores; gets a gradient).
        dropout_p: dropout probability of the attention weights. The dropout is counter-based: a seed gives the same
            mask on every backend.
        is_causal: query i attends to key j only if j <= i + offset.
        scale: factor of the scores; default 1 / sqrt(D).
        enable_gqa: allow H to be a multiple of Hk.
        bias: a float bias in addition to a bool attn_mask; broadcasts to (B, H, Sq, Sk); gets a gradient.
        key_lengths: (B,) int32 or int64; keys at and after this position do not take part.
        causal_alignment: "top_left" (as torch): offset = 0. "bottom_right" (as in decoding): offset = Sk - Sq, where Sk
            is the key length of the sequence.
        window: (left, right), how many keys before and after position i + offset query i attends to; None for no limit
            on a side.
        softcap: c > 0 replaces a scaled score s by c * tanh(s / c), before any bias; 0 is off.
        relative_bias: adds table[bucket(j - i - offset), h] to the scores.
        return_lse: also return the log-sum-exp of the scores.
        generator: the torch.Generator from which dropout draws its seed; default torch's own of the device.

    Returns:
        The output (B, H, Sq, Dv), in memory as (B, Sq, H, Dv). With return_lse a tuple of it and the natural
        log-sum-exp of the scores, (B, H, Sq) float32, differentiable. A row without keys to attend to gives zeros, lse
        -inf and zero gradients.

        Gradients are deterministic, as the kernels use no atomics. (torch's own kernels, the sdpa backend, are
        deterministic only under torch.use_deterministic_algorithms(True).) In Triton this takes seven matrix products,
        because Q K^T and dO V^T are computed once for dK and dV and once for dQ; a backward pass that adds to dQ
        atomically has five. Two more are needed for a gradient of bias or relative_bias, for dropout with a mask or a
        bias, and for at most 128 keys: they compute delta without the rounding of the output.

    Raises:
        TypeError, ValueError: if an argument is invalid; the message names it, its value and what is expected.

    Source:
        Vaswani et al., "Attention Is All You Need", 2017, section 3.2; Dao, "FlashAttention-2", 2023.

    Examples:
        >>> import torch, transformer_fast
        >>> q, k, v = torch.randn(3, 2, 8, 128, 64).unbind()
        >>> lengths = torch.tensor([128, 37])
        >>> transformer_fast.scaled_dot_product_attention(q, k, v, key_lengths=lengths, is_causal=True).shape
        torch.Size([2, 8, 128, 64])
    """
    known, again, spread = None, None, _parallel.current()
    if (
        spread is None and bias is None and key_lengths is None and window is None and relative_bias is None
        and type(dropout_p) in (float, int) and dropout_p == 0 and type(softcap) is float and softcap == 0.0
        and (scale is None or type(scale) is float)
        and type(is_causal) is bool and type(enable_gqa) is bool and type(causal_alignment) is str
        and (attn_mask is None or (isinstance(attn_mask, torch.Tensor) and attn_mask.dtype is torch.bool))
    ):  # fmt: skip
        known = _direct.signature(query, key, value, attn_mask, is_causal, scale, enable_gqa, causal_alignment)
        if known is not None:
            found = _direct.padded(
                known, query, key, value, attn_mask, is_causal, causal_alignment == "bottom_right", return_lse
            )
            if found is not None:
                return found
        elif attn_mask is None:
            again = _common.signature(
                (query, key, value), is_causal, scale, enable_gqa, causal_alignment, strided=True
            )  # fmt: skip
            if again is not None and autocasts(query):
                again = None
            call = None if again is None else remembered.find(again)
            if call is not None:
                out = call(query, key, value)
                return out if return_lse else out[0]
    _common.check_flag("return_lse", return_lse)
    for name, t in (("query", query), ("key", key), ("value", value)):
        _common.check_floating(name, t)
        if t is not query:
            _common.check_same(name, t, "query", query, dtype=not autocasts(query))
    _common.check_flag("enable_gqa", enable_gqa)
    query, key, value = autocast(query, key, value)
    given = shaped(query, key, value, enable_gqa)
    as_given = given.query is query and given.key is key and given.value is value
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1] or 1)
    query, key, value = given[:3]
    b, h, sq, _ = query.shape
    sk = key.shape[2]
    check_qkv(query, key, value)
    if not as_given:
        attn_mask, bias = (
            given.restrict(name, t) if isinstance(t, torch.Tensor) else t
            for name, t in (("attn_mask", attn_mask), ("bias", bias))
        )
        if isinstance(key_lengths, torch.Tensor) and tuple(key_lengths.shape) == given.batch:
            key_lengths = key_lengths.reshape(-1)
    mask, bias = split_mask(attn_mask, bias, (b, h, sq, sk), query)
    if key_lengths is not None:
        check_lengths("key_lengths", key_lengths, b, sk if spread is None else sk * spread.size, query)
    if known is not None and causal_alignment in CAUSAL and as_given and (attn_mask is None or attn_mask.dim() == 4):
        _remember(known, query, key, mask, None, is_causal, causal_alignment, scale)
    out = _attend(
        query, key, value, bias, mask, key_lengths, None, None, sq, sk, relative_bias, dropout_p, is_causal,
        causal_alignment, window, softcap, scale, return_lse, generator,
    )  # fmt: skip
    if as_given:
        if again is not None and query.numel() and key.numel():
            args = None, None, None, None, None, sq, sk, None, 0, False, None, float(scale), CAUSAL[causal_alignment]
            spec = AttentionSpec(query, key, value, *args, -1, 0 if is_causal else -1, 0.0, 0.0)
            remember(again, spec, choose(spec).name)
        return out
    return (given.restore(out[0]), given.restore_lse(out[1])) if return_lse else given.restore(out)


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    attn_mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    causal_alignment: str = "top_left",
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    relative_bias: RelativeBias | None = None,
    return_lse: bool = False,
    generator: torch.Generator | None = None,
):
    """Attention over concatenated sequences of different lengths, without padding.

    Arguments that are not explained are those of scaled_dot_product_attention.

    Args:
        query: (total_q, H, D), float16, bfloat16 or float32 (float64 in plain PyTorch).
        key: (total_k, Hk, D), query's dtype, H % Hk == 0.
        value: (total_k, Hk, D), query's dtype.
        cu_seqlens_q: (B + 1,) int32 or int64, cumulative lengths from 0 to total_q; sequence b has the rows
            cu_seqlens_q[b] .. cu_seqlens_q[b + 1] - 1.
        cu_seqlens_k: the same for keys; default cu_seqlens_q.
        max_seqlen_q: the length of the longest sequence. If None it is computed from cu_seqlens_q, which synchronises
            on a GPU.
        max_seqlen_k: the same for keys.
        dropout_p: dropout probability. The mask depends on positions within the sequence, so an unpadded and a padded
            call drop the same elements.
        is_causal: bool.
        scale: default 1 / sqrt(D).
        attn_mask: broadcasts to (B, H, max_seqlen_q, max_seqlen_k); indexed by positions within the sequence.
        bias: float, shaped and indexed as attn_mask.
        causal_alignment: "top_left" or "bottom_right".
        window: (left, right).
        softcap: c > 0; 0 is off.
        relative_bias: T5's relative position bias.
        return_lse: also return the log-sum-exp of the scores.
        generator: the torch.Generator from which dropout draws its seed.

    Returns:
        The output (total_q, H, D). With return_lse a tuple of it and lse, (H, total_q) float32.

    Raises:
        TypeError, ValueError: if an argument is invalid; the message names it, its value and what is expected.

    Source:
        As scaled_dot_product_attention.

    Examples:
        >>> import torch, transformer_fast
        >>> q, k, v = torch.randn(3, 165, 8, 64).unbind()  # sequences of 128 and 37 tokens
        >>> transformer_fast.varlen_attention(q, k, v, torch.tensor([0, 128, 165], dtype=torch.int32)).shape
        torch.Size([165, 8, 64])
    """
    known = None
    if (
        _parallel.current() is None and cu_seqlens_k is None and attn_mask is None and bias is None
        and window is None and relative_bias is None and dropout_p == 0 and type(softcap) is float and softcap == 0.0
        and (max_seqlen_k is None or max_seqlen_k is max_seqlen_q) and causal_alignment == "top_left"
        and (scale is None or type(scale) is float) and type(is_causal) is bool
        and isinstance(cu_seqlens_q, torch.Tensor) and (max_seqlen_q is None or type(max_seqlen_q) is int)
    ):  # fmt: skip
        known = _direct.signature(query, key, value, cu_seqlens_q, is_causal, scale)
        if known is not None:
            found = _direct.unpadded(known, query, key, value, cu_seqlens_q, max_seqlen_q, is_causal, return_lse)
            if found is not None:
                return found
    _common.check_flag("return_lse", return_lse)
    for name, t in (("query", query), ("key", key), ("value", value)):
        _common.check_floating(name, t)
        if t.dim() != 3:
            raise ValueError(f"{name}: wanted 3 dimensions (total, H, D), got shape {tuple(t.shape)}")
    query, key, value = autocast(query, key, value)
    check_qkv(query, key, value)
    if value.shape[0] != key.shape[0]:
        raise ValueError(f"value: wanted {key.shape[0]} rows as key has, got {value.shape[0]}")
    shared = cu_seqlens_k is None
    cu_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    cu_seqlens_q, longest_q = check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, query, max_seqlen_q)
    if shared and key.shape[0] == query.shape[0] and (max_seqlen_k is None or max_seqlen_k is max_seqlen_q):
        cu_k, longest_k = cu_seqlens_q, longest_q
    else:
        cu_k, longest_k = check_cu_seqlens("cu_seqlens_k", cu_k, key, max_seqlen_k)
    batch = cu_seqlens_q.shape[0] - 1
    if cu_k.shape[0] != batch + 1:
        raise ValueError(f"cu_seqlens_k: wanted {batch + 1} entries as cu_seqlens_q has, got {cu_k.shape[0]}")
    mask, bias = split_mask(attn_mask, bias, (batch, query.shape[1], longest_q, longest_k), query)
    if known is not None and shared and cu_k is cu_seqlens_q:
        _remember(known, query, key, None, cu_k, is_causal, causal_alignment, scale)
    return _attend(
        query, key, value, bias, mask, None, cu_seqlens_q, cu_k, longest_q, longest_k, relative_bias, dropout_p,
        is_causal, causal_alignment, window, softcap, scale, return_lse, generator,
    )  # fmt: skip


def qkv_attention(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    key_lengths: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    return_lse: bool = False,
):
    """Self-attention on one tensor of query, key and value projections. Its gradient is one tensor too, without copies
    or sums of slices.

    Args:
        qkv: (total, 3, H, D) with cu_seqlens, or (B, S, 3, H, D); float16, bfloat16 or float32 (float64 in plain
            PyTorch).
        cu_seqlens: (B + 1,) int32 or int64, as in varlen_attention; None for (B, S, 3, H, D).
        max_seqlen: the length of the longest sequence; None: computed from cu_seqlens.
        dropout_p: as in scaled_dot_product_attention.
        is_causal: each token attends only to itself and the tokens before it.
        scale: default 1 / sqrt(D).
        key_lengths: (B,) int32 or int64, for (B, S, 3, H, D); keys at and after this position do not take part.
        generator: the torch.Generator from which dropout draws its seed.
        return_lse: also return the log-sum-exp of the scores.

    Returns:
        The output (total, H, D) or (B, S, H, D). With return_lse a tuple of it and lse, (H, total) or (B, H, S)
        float32, which gets no gradient here.

    Raises:
        TypeError, ValueError: if an argument is invalid; the message names it, its value and what is expected.

    Source:
        As scaled_dot_product_attention.

    Examples:
        >>> import torch, transformer_fast
        >>> transformer_fast.ops.qkv_attention(torch.randn(2, 16, 3, 4, 32), is_causal=True).shape
        torch.Size([2, 16, 4, 32])
    """
    unpadded, spread = cu_seqlens is not None, _parallel.current()
    _common.check_floating("qkv", qkv)
    _common.check_probability("dropout_p", dropout_p)
    _common.check_flag("return_lse", return_lse)
    if qkv.dim() != (4 if unpadded else 5) or qkv.shape[-3] != 3:
        wanted = "(total, 3, H, D)" if unpadded else "(B, S, 3, H, D)"
        raise ValueError(f"qkv: wanted shape {wanted}, got {tuple(qkv.shape)}")
    if spread is not None or (
        dropout_p == 0 and key_lengths is None and qkv.is_cpu and _common.direct(qkv) and not autocasts(qkv)
    ):
        return _attend_to_parts(
            qkv, cu_seqlens, max_seqlen, dropout_p, is_causal, scale, key_lengths, generator, return_lse
        )
    signature, given = None, cu_seqlens
    if (
        key_lengths is None and type(dropout_p) is float and dropout_p < 1.0 and type(is_causal) is bool
        and (scale is None or type(scale) is float)
        and (cu_seqlens is None or (type(max_seqlen) is int and isinstance(cu_seqlens, torch.Tensor)))
    ):  # fmt: skip
        signature = _common.signature((qkv, cu_seqlens), "qkv", dropout_p, is_causal, scale, max_seqlen)
        call = None if signature is None else remembered.find(signature)
        if call is not None:
            out, lse = call(qkv, cu_seqlens, _common.draw_rng(qkv.device, generator) if dropout_p else None)
            return (out, lse) if return_lse else out
    check_head_dim("qkv", qkv.shape[-1])
    if unpadded:
        cu_seqlens, longest = check_cu_seqlens("cu_seqlens", cu_seqlens, qkv, max_seqlen)
    else:
        longest = qkv.shape[1]
        if key_lengths is not None:
            check_lengths("key_lengths", key_lengths, qkv.shape[0], longest, qkv)
    _common.check_flag("is_causal", is_causal)
    rng, p, nothing = dropout_state(dropout_p, qkv.device, generator)
    args = (qkv, key_lengths, cu_seqlens, longest, rng, scale_or_default(scale, qkv.shape[-1]), int(bool(is_causal)), p)
    if _common.transformed():
        out, lse = qkv_plain(QkvSpec(*args))
    elif _common.direct(qkv):
        out, lse = qkv_forward_impl(*args)
    else:
        out, lse = qkv_attention_op(*args)
    # Lengths that are read are checked in every call.
    if (
        signature is not None and cu_seqlens is given and (p > 0) == (dropout_p > 0) and qkv.numel()
        and (cu_seqlens is None or not readable(cu_seqlens))
    ):  # fmt: skip
        remember_qkv(signature, QkvSpec(*args))
    if nothing:
        out = out * 0
    return (out, lse) if return_lse else out


def _attend_to_parts(
    qkv, cu_seqlens, max_seqlen, dropout_p, is_causal, scale, key_lengths, generator, return_lse
):  # fmt: skip
    """qkv_attention on views of query, key and value. It is used without gradients and under context_parallel."""
    query, key, value = qkv.unbind(-3)
    if cu_seqlens is not None:
        return varlen_attention(
            query, key, value, cu_seqlens, max_seqlen_q=max_seqlen, dropout_p=dropout_p, is_causal=is_causal,
            scale=scale, generator=generator, return_lse=return_lse,
        )  # fmt: skip
    out = scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), dropout_p=dropout_p, is_causal=is_causal,
        scale=scale, key_lengths=key_lengths, generator=generator, return_lse=return_lse,
    )  # fmt: skip
    return (out[0].transpose(1, 2), out[1]) if return_lse else out.transpose(1, 2)


# ---- shared by the public functions ----------------------------------------------------------------
def _attend(
    query, key, value, bias, mask, key_lengths, cu_q, cu_k, max_q, max_k, relative_bias, dropout_p, is_causal,
    causal_alignment, window, softcap, scale, return_lse, generator,
):  # fmt: skip
    check_alignment(causal_alignment)
    _common.check_flag("is_causal", is_causal)
    # The alignment also shifts windows and relative positions, so it matters without is_causal too.
    alignment = CAUSAL[causal_alignment]
    left, right = check_window(window)
    if is_causal:
        right = 0
    check_softcap(softcap)
    table, distance, bidirectional = check_relative(relative_bias, query)
    rng, p, nothing = dropout_state(dropout_p, query.device, generator)
    args = (
        query, key, value, bias, mask, key_lengths, cu_q, cu_k, max_q, max_k, table, distance, bidirectional, rng,
        scale_or_default(scale, query.shape[-1]), alignment, left, right, float(softcap), p,
    )  # fmt: skip
    spread = _parallel.current()
    if spread is not None:
        out, lse = spread.attend(AttentionSpec(*args))
    elif _common.transformed():
        out, lse = plain(AttentionSpec(*args))
    elif _common.direct(query, key, value, bias, table):
        out, lse = forward_impl(*args)
    else:
        out, lse = attention_op(*args)
    if nothing:
        out = out * 0
    return (out, lse) if return_lse else out


def _remember(known, query, key, mask, cu_seqlens, is_causal, causal_alignment, scale) -> None:
    """Remember that this call, on the CPU and without gradients, passed its checks."""
    if not query.numel() or not key.numel():
        return
    args = (query, key, key, None, mask, None, cu_seqlens, cu_seqlens, 0, 0, None, 0, False, None)
    spec = AttentionSpec(
        *args, scale_or_default(scale, query.shape[-1]), CAUSAL[causal_alignment], -1, 0 if is_causal else -1, 0.0, 0.0
    )
    _direct.remember(known, choose(spec).name, spec.scale)


__all__ = [
    "RelativeBias",
    "qkv_attention",
    "scaled_dot_product_attention",
    "varlen_attention",
]
