"""The native step's choice of tokens, without and from its logits: what torch makes of the same logits."""

import math

import pytest
import torch
from instruction_sets import running_on
from native_decoders import FAMILIES, OFFSET, Decoder, make_cache
from numerics import assert_as_accurate
from torch import nn

from transformer_fast.backends import native
from transformer_fast.ops.linear_int8 import Int8Weight, quantize_weight

if native.load():
    pytest.skip(native.load(), allow_module_level=True)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def model_of(vocabulary: int, family: str = "gpt2", change=None, **options) -> Decoder:
    torch.manual_seed(7)
    model = Decoder(**{**FAMILIES[family], **options}).eval()
    weight = torch.randn(vocabulary, model.token.embedding_dim)
    if change is not None:
        change(weight)
    model.head = nn.Linear(weight.shape[1], vocabulary, bias=False)
    model.head.weight.copy_(weight)
    model.head_bias = None if model.head_bias is None else torch.randn(1, vocabulary)
    return model


def caches(model: Decoder, rows: int, int8: bool, **more):
    """Two caches alike, empty. int8: of a head in int8."""
    ids = torch.randint(61, (rows, 1))
    found = [make_cache(model, ids, **more) for _ in range(2)]
    if int8:
        panels = Int8Weight(*quantize_weight(model.head.weight)).data
        for cache in found:
            cache.weights.head = [panels, *cache.weights.head[1:]]
            floats = torch.ops.transformer_fast.cpu_decoder_split_floats(panels)
            cache.weights.split_floats = max(cache.weights.split_floats, floats)
        found = [type(c)(c.weights, rows, 2) for c in found]
    return found, ids[:, 0]


def both(model, rows, barred=None, count=0, int8=False, **more):
    """Logits of a step, barred ones -inf, and what the other cache's choice is, of count tokens with their values."""
    (a, b), ids = caches(model, rows, int8, **more)
    positions = torch.full((rows,), OFFSET) if model.position is not None else None
    logits = a.step(ids, positions).clone()
    if count:
        return logits, b.rank(ids, positions, count, barred)
    if barred is not None:
        logits[:, barred[(barred >= 0) & (barred < logits.shape[1])]] = -math.inf
    return logits, b.choose(ids, positions, barred)


@pytest.mark.parametrize("rows, vocabulary", [(1, 2000), (9, 1003), (29, 333), (3, 5)])
@pytest.mark.parametrize("isa", native.supported_isas())
def test_the_token_is_the_first_of_the_largest(isa, rows, vocabulary):
    barred = torch.tensor([0, 4, vocabulary - 1, vocabulary + 7, -3])
    with running_on(isa):
        for more in ({}, {"copy": False}, {"storage": torch.bfloat16}, {"storage": torch.int8}, {"int8": True}):
            for bar in (None, barred):
                logits, tokens = both(model_of(vocabulary), rows, bar, **more)
                assert torch.equal(tokens, logits.argmax(-1)), more


@pytest.mark.quick
def test_quick():
    logits, tokens = both(model_of(100), 2)
    assert torch.equal(tokens, logits.argmax(-1))


@pytest.mark.parametrize("options", [{"head_scale": -0.3}, {"head_scale": 0.3, "logits_softcap": 2.0}], ids=str)
def test_what_follows_the_product_comes_first(options):
    """A scale, a bias and a softcap change which logit is the largest, or make two alike."""
    logits, tokens = both(model_of(400, head_bias=True, **options), 5)
    assert torch.equal(tokens, logits.argmax(-1))


def _ties(weight):
    weight[:] = weight[:1]


def _late_tie(weight):
    weight[40:] = weight[:1] * 3
    weight[:40] = weight[:40] / 9


def _nan(weight):
    weight[70] = math.nan


def _infinite(weight):
    weight[50:60, 0] = math.inf


def _nothing(weight):
    weight[:] = -math.inf


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("change", [_ties, _late_tie, _nan, _infinite, _nothing])
def test_ties_and_what_is_not_finite(change, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        logits, tokens = both(model_of(300, change=change), 6)
        assert torch.equal(tokens, logits.argmax(-1))
        _, (values, ranked) = both(model_of(300, change=change), 6, count=4)
    finally:
        torch.set_num_threads(before)
    wanted = torch.log_softmax(logits, -1).topk(4)[0]
    assert torch.equal(values.isnan(), wanted.isnan()) and ((ranked >= 0) & (ranked < 300)).all()
    assert all(len(set(row.tolist())) == 4 for row in ranked)


def test_a_head_in_columns_is_not_asked():
    model = model_of(100)
    model.head.weight = nn.Parameter(model.head.weight.t().contiguous().t())
    cache = make_cache(model, torch.zeros(2, 1, dtype=torch.long), copy=False)
    assert not cache.weights.can_choose
    assert make_cache(model, torch.zeros(2, 1, dtype=torch.long)).weights.can_choose
    with pytest.raises(RuntimeError, match=r"weights: wanted those of the head \(out, in\)"):
        cache.choose(torch.zeros(2, dtype=torch.long), torch.full((2,), OFFSET), None)


@pytest.mark.parametrize("rows, vocabulary, count", [(1, 2000, 8), (9, 1003, 4), (33, 70, 70), (40, 257, 1)])
@pytest.mark.parametrize("isa", native.supported_isas())
def test_ranks(isa, rows, vocabulary, count):
    barred = torch.tensor([1, vocabulary - 1, vocabulary + 2, -1])
    kept = barred[:2]
    with running_on(isa):
        for int8, bar in ((False, None), (True, barred)):
            logits, (values, tokens) = both(model_of(vocabulary), rows, bar, count, int8)
            scores, truth = torch.log_softmax(logits, -1), torch.log_softmax(logits.double(), -1)
            if bar is not None:
                scores[:, kept] = truth[:, kept] = -math.inf
                logits[:, kept] = -math.inf
            # of logits that are alike the first: random ones are not
            assert torch.equal(tokens, logits.sort(dim=-1, descending=True, stable=True)[1][:, :count])
            finite = values.isfinite()
            assert torch.equal(finite, scores.gather(1, tokens).isfinite())
            assert_as_accurate(values[finite], truth.gather(1, tokens)[finite], scores.gather(1, tokens)[finite])


def test_refused_calls():
    (cache, _), ids = caches(model_of(50), 2, False)
    at = torch.full((2,), OFFSET)
    for count in (0, 51):
        with pytest.raises(RuntimeError, match=r"tokens: wanted \(2, 1 .. 50\), got"):
            cache.rank(ids, at, count, None)
    with pytest.raises(RuntimeError, match="is not one of 61 tokens"):
        cache.choose(ids + 61, at, None)
