"""The attention function: arguments that transformers may pass, and arguments that are refused."""

import types

import pytest
import torch
from hf_models import _reference_attention
from numerics import assert_as_accurate
from transformers.masking_utils import sdpa_mask

from transformer_fast.integrations.huggingface import attention_forward

MODULE = types.SimpleNamespace(is_causal=True)


def _qkv(dtype, hk=2, sq=5, sk=7, d=8, dv=8):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, sq, d), (2, hk, sk, d), (2, hk, sk, dv))
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def _against_reference(mask=None, *, sq=5, sk=7, dv=8, given="same", reference=_reference_attention, **options):
    given = mask if isinstance(given, str) else given
    inputs = {dtype: _qkv(dtype, sq=sq, sk=sk, dv=dv) for dtype in (torch.float32, torch.float64)}
    ours, weights = attention_forward(MODULE, *inputs[torch.float32], given, **options)
    truth, eager = (reference(MODULE, *inputs[d], mask, **options)[0] for d in (torch.float64, torch.float32))
    assert ours.is_contiguous() or dv != 8
    assert_as_accurate(ours, truth, eager)
    return weights


def test_no_mask_is_causal_from_the_first_key():
    mask = sdpa_mask(2, 5, 7, allow_is_causal_skip=False)
    _against_reference(mask, given=None)


def test_no_mask_with_one_query_sees_all():
    _against_reference(torch.ones(2, 1, 1, 7, dtype=torch.bool), given=None, sq=1)


def test_is_causal_argument_wins():
    inputs = {dtype: _qkv(dtype) for dtype in (torch.float32, torch.float64)}
    out, _ = attention_forward(MODULE, *inputs[torch.float32], None, is_causal=False)
    truth, eager = (_reference_attention(MODULE, *inputs[d], None)[0] for d in (torch.float64, torch.float32))
    assert_as_accurate(out, truth, eager)


@pytest.mark.parametrize("sq", [1, 7])
def test_no_mask_with_sliding_window(sq):
    i, j = torch.arange(7 - sq, 7)[:, None], torch.arange(7)
    mask = ((j <= i) & (j > i - 3)).expand(2, 1, sq, 7)
    inputs = {dtype: _qkv(dtype, sq=sq) for dtype in (torch.float32, torch.float64)}
    ours, _ = attention_forward(MODULE, *inputs[torch.float32], None, sliding_window=3)
    truth, eager = (_reference_attention(MODULE, *inputs[d], mask)[0] for d in (torch.float64, torch.float32))
    assert_as_accurate(ours, truth, eager)


@pytest.mark.parametrize("dv", [4, 12])
def test_value_of_another_width(dv):
    mask = torch.rand(2, 1, 5, 7) < 0.7
    _against_reference(mask, dv=dv)
    _against_reference(mask, dv=dv, scaling=0.3)


def test_position_bias_beside_bool_and_float_masks():
    bias = torch.randn(1, 4, 5, 7)
    mask = torch.rand(2, 1, 5, 7) < 0.7
    mask[..., 0] = True
    _against_reference(mask, position_bias=bias, scaling=1.0)
    _against_reference(mask, given=torch.zeros(mask.shape).masked_fill(~mask, -torch.inf), position_bias=bias)


def test_position_bias_gradient_under_causality():
    bias = torch.randn(1, 4, 5, 5, requires_grad=True)
    out, _ = attention_forward(MODULE, *_qkv(torch.float32, sk=5), None, position_bias=bias)
    out.square().sum().backward()
    assert bias.grad.tril().abs().sum() > 0 and bias.grad.triu(1).abs().sum() == 0


def _with_sinks(module, query, key, value, mask, s_aux=None, **options):
    """The reference: one more key with score s_aux and value zero."""
    wide = torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    sinks = s_aux.to(wide).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    weights = torch.softmax(torch.cat([scores, sinks], -1), -1)[..., :-1].to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


def test_attention_sinks():
    mask = torch.rand(2, 1, 5, 7) < 0.7
    mask[0, 0, 2] = False
    sinks = torch.randn(4, requires_grad=True)
    _against_reference(mask, s_aux=sinks, reference=_with_sinks)
    inputs = _qkv(torch.float32)
    out, weights = attention_forward(MODULE, *inputs, mask, s_aux=sinks, output_attentions=True)
    expected = _with_sinks(MODULE, *(t.double() for t in inputs), mask, s_aux=sinks)
    assert_as_accurate(weights, expected[1], _with_sinks(MODULE, *inputs, mask, s_aux=sinks)[1])
    (grad,) = torch.autograd.grad(out.square().sum(), sinks)
    assert grad.isfinite().all() and grad.abs().min() > 0


def test_dropout_is_applied_and_repeatable():
    inputs = _qkv(torch.float32)
    torch.manual_seed(5)
    first = attention_forward(MODULE, *inputs, None, dropout=0.5)[0]
    torch.manual_seed(5)
    assert torch.equal(first, attention_forward(MODULE, *inputs, None, dropout=0.5)[0])
    assert not torch.equal(first, attention_forward(MODULE, *inputs, None)[0])


def test_refusals_name_the_argument():
    inputs = _qkv(torch.float32)
    with pytest.raises(NotImplementedError, match="cache.*paged.*wanted none"):
        attention_forward(MODULE, *inputs, None, cache=object())
    with pytest.raises(TypeError, match="attn_mask: wanted bool or a float dtype, got torch.int64"):
        attention_forward(MODULE, *inputs, torch.ones(2, 1, 5, 7, dtype=torch.long))
    with pytest.raises(ValueError, match="attn_mask: wanted a shape that broadcasts"):
        attention_forward(MODULE, *inputs, torch.ones(2, 1, 5, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match="head dim in 1..256, got 300"):
        attention_forward(MODULE, *_qkv(torch.float32, d=300, dv=300), None)
