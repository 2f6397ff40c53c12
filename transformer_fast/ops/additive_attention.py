"""Additive (Bahdanau) attention. The (B, Sq, Sk, D) hidden layer of its score network is never stored."""

import torch

from ..backends import Backend, Call, eager, memory, select
from ..backends.specs import AdditiveAttentionSpec
from . import _common, _parallel

_FIELDS = ("query", "key", "value", "score_weight", "bias")


def _select(spec: AdditiveAttentionSpec) -> Backend:
    return select(Call("additive_attention", spec.query.device.type, spec.query.dtype, spec.query.shape[2]))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def _laid_out(spec: AdditiveAttentionSpec) -> AdditiveAttentionSpec:
    return spec._replace(
        query=memory.unit_stride(spec.query), key=memory.unit_stride(spec.key), value=memory.unit_stride(spec.value)
    )  # fmt: skip


def _forward(*args) -> tuple[torch.Tensor, torch.Tensor]:
    """The context (B, Sq, Dv) in query's dtype, and the weights (B, Sq, Sk) in float32, which the backward pass
    needs."""
    spec = _laid_out(AdditiveAttentionSpec(*args))
    query, keys = spec.query, spec.key.shape[1]
    batch, queries, width = query.shape
    out = memory.empty((batch, queries, spec.value.shape[2]), query.dtype, query.device)
    weights = memory.empty((batch, queries, keys), _wide(query.dtype), query.device)
    if batch and queries:
        if keys and width:
            _select(spec).additive_attention_forward(spec, out, weights)
        else:  # no keys, or a width of 0, with which all scores are zero
            for buffer, result in zip((out, weights), eager.additive_attention(spec)):
                buffer.copy_(result)
    return out, weights


def _forward_fake(query, key, value, *_):
    batch, queries, _ = query.shape
    return (
        query.new_empty((batch, queries, value.shape[2])),
        query.new_empty((batch, queries, key.shape[1]), dtype=_wide(query.dtype)),
    )


def _backward_impl(grad_out, grad_weights, weights, *fields) -> tuple[torch.Tensor, ...]:
    """Gradients of query, key, value, score_weight and bias (empty without a bias)."""
    spec = _laid_out(AdditiveAttentionSpec(*fields))
    query, key, value, score_weight, bias, *_ = spec
    device, wide = query.device, weights.dtype
    grad_query = memory.empty(query.shape, wide, device)
    grad_key, grad_value = (memory.empty(t.shape, t.dtype, device) for t in (key, value))
    grad_score = memory.empty((query.shape[0], query.shape[2]), wide, device)  # one part per sequence
    if weights.numel() and query.shape[2] and value.shape[2]:
        _select(spec).additive_attention_backward(
            spec, grad_out.contiguous(), None if grad_weights is None else grad_weights.contiguous(), weights,
            grad_query, grad_key, grad_value, grad_score,
        )  # fmt: skip
    else:
        eager.additive_attention_backward(spec, grad_out, grad_weights, (grad_query, grad_key, grad_value, grad_score))
    # Sum before rounding to query's dtype.
    grad_bias = grad_query.new_empty(0) if bias is None else grad_query.sum((0, 1)).to(bias.dtype)
    return grad_query.to(query.dtype), grad_key, grad_value, grad_score.sum(0).to(score_weight.dtype), grad_bias


def _backward_fake(grad_out, grad_weights, weights, query, key, value, score_weight, bias, *_):
    bias_shape = (0,) if bias is None else bias.shape
    return (
        *(t.new_empty(t.shape) for t in (query, key, value, score_weight)),
        query.new_empty(bias_shape, dtype=weights.dtype if bias is None else bias.dtype),
    )


_SPEC = _common.schema_of(AdditiveAttentionSpec)
_backward_op = _common.define(
    "additive_attention_backward",
    f"(Tensor grad_out, Tensor? grad_weights, Tensor weights, {_SPEC}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)


def _plain(spec: AdditiveAttentionSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """The context and the weights in plain PyTorch, for gradients of gradients."""
    out, weights = eager.additive_attention(spec)
    return out, weights.to(_wide(out.dtype))


def _setup(ctx, inputs, output):
    _common.save(ctx, AdditiveAttentionSpec(*inputs), output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, need, grad_out, grad_weights):
    spec, weights = _common.saved(ctx)
    if grad_out is None and grad_weights is None:
        return {}
    if grad_out is None:
        grad_out = spec.query.new_zeros((*spec.query.shape[:2], spec.value.shape[2]))
    if torch.is_grad_enabled():  # gradients of gradients
        return _common.gradients_of(_plain, spec, _FIELDS, (grad_out, grad_weights))
    return dict(zip(_FIELDS, _backward_op(grad_out, grad_weights, weights, *spec)))


_op = _common.define(
    "additive_attention",
    f"({_SPEC}) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_setup,
    backward=_backward,
)


def _check(query, key, value, score_weight, bias) -> None:
    for name, t in zip(_FIELDS[:3], (query, key, value)):
        _common.check_floating(name, t)
        if t.dim() != 3:
            raise ValueError(f"{name}: wanted 3 dimensions (B, S, D), got shape {tuple(t.shape)}")
        _common.check_same(name, t, "query", query)
        if t.shape[0] != query.shape[0]:
            raise ValueError(f"{name}: wanted batch {query.shape[0]} as query has, got {t.shape[0]}")
    if key.shape[2] != query.shape[2]:
        raise ValueError(f"key: wanted width {query.shape[2]} as query has, got {key.shape[2]}")
    if value.shape[1] != key.shape[1]:
        raise ValueError(f"value: wanted {key.shape[1]} positions as key has, got {value.shape[1]}")
    if score_weight is None:
        raise TypeError("score_weight: wanted a tensor, got NoneType")
    for name, t in (("score_weight", score_weight), ("bias", bias)):
        _common.check_vector(name, t, query.shape[2], query)
        if t is not None and t.dtype not in (query.dtype, torch.float32):
            raise TypeError(f"{name}: has dtype {t.dtype} but query has {query.dtype}; wanted that or float32")


def _check_mask(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    if mask is None:
        return None
    _common.check_tensor("attn_mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"attn_mask: wanted a bool tensor, got {mask.dtype}")
    _common.check_same("attn_mask", mask, "query", query, dtype=False)
    shape = (query.shape[0], query.shape[1], key.shape[1])
    try:
        return mask.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"attn_mask: wanted (B, Sq, Sk) = {shape} or a shape that broadcasts to it, got {tuple(mask.shape)}"
        ) from None


def _check_lengths(lengths: torch.Tensor | None, query: torch.Tensor, keys: int) -> torch.Tensor | None:
    if lengths is None:
        return None
    _common.check_integers("key_lengths", lengths)
    if lengths.shape != (query.shape[0],):
        raise ValueError(f"key_lengths: wanted shape ({query.shape[0]},), got {tuple(lengths.shape)}")
    _common.check_same("key_lengths", lengths, "query", query, dtype=False)
    if lengths.device.type == "cpu" and lengths.numel() and _common.concrete(lengths):
        low, high = (int(t) for t in torch.aminmax(lengths))
        if low < 0 or high > keys:
            raise ValueError(f"key_lengths: wanted values in [0, {keys}], got {low if low < 0 else high}")
    return lengths.to(torch.int64).contiguous()


def additive_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score_weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    attn_mask: torch.Tensor | None = None,
    *,
    key_lengths: torch.Tensor | None = None,
    return_weights: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """context_i = sum_j w_ij value_j,  w_i = softmax_j(score_weight . tanh(query_i + key_j + bias)).

    The hidden layer, (B, Sq, Sk, D), is never stored. The backward pass keeps the inputs and w in float32. Hidden
    layer, scores and softmax are computed in float32. Results are deterministic. Under autocast the op runs in
    autocast's dtype.

    Args:
        query: (B, Sq, D), the projected decoder states W_q q; float16, bfloat16 or float32 (float64 in plain PyTorch).
        key: (B, Sk, D), the projected encoder states W_k k, query's dtype. A decoder computes them once for all steps.
        value: (B, Sk, Dv), query's dtype.
        score_weight: (D,), query's dtype or float32.
        bias: (D,), query's dtype or float32.
        attn_mask: bool, broadcasts to (B, Sq, Sk); True takes part.
        key_lengths: (B,) int32 or int64; keys at and after this position do not take part.
        return_weights: also return w.

    Returns:
        The context (B, Sq, Dv). With return_weights a tuple of it and w, (B, Sq, Sk) in query's dtype, differentiable.
        A query without keys to attend to gets zeros and zero gradients.

    Raises:
        TypeError, ValueError: if an argument is invalid; the message names it, its value and what is expected.

    Source:
        Bahdanau, Cho and Bengio, "Neural Machine Translation by Jointly Learning to Align and Translate", 2015, section
        3.1 and appendix A.1.2.

    Examples:
        >>> import torch, transformer_fast
        >>> query, key, value = torch.randn(2, 5, 16), torch.randn(2, 7, 16), torch.randn(2, 7, 32)
        >>> transformer_fast.additive_attention(query, key, value, torch.randn(16)).shape
        torch.Size([2, 5, 32])
    """
    _parallel.refuse("additive_attention", "run recurrent models on whole sequences")
    for name, t in zip(_FIELDS[:3], (query, key, value)):
        _common.check_floating(name, t)
    cast = _common.autocast_dtype(query.device)
    if cast is not None:
        query, key, value = (t.to(cast) for t in (query, key, value))
        score_weight, bias = (  # type: ignore[assignment]
            t.to(cast) if isinstance(t, torch.Tensor) and t.dtype not in (cast, torch.float32) else t
            for t in (score_weight, bias)
        )
    _check(query, key, value, score_weight, bias)
    attn_mask = _check_mask(attn_mask, query, key)
    key_lengths = _check_lengths(key_lengths, query, key.shape[1])
    tensors = (query, key, value, score_weight, bias)
    if _common.transformed():
        out, weights = eager.additive_attention(AdditiveAttentionSpec(*tensors, attn_mask, key_lengths))
    else:
        out, weights = (_forward if _common.direct(*tensors) else _op)(*tensors, attn_mask, key_lengths)
    return (out, weights.to(out.dtype)) if return_weights else out
