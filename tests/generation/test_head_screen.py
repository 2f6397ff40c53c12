"""Greedy decoding with a head screen chooses the first of the largest float32 logits, whatever the weights."""

import math

import pytest
import torch
from instruction_sets import running_on
from recurrent_models import batch, build

from transformer_fast.backends import native
from transformer_fast.generation import weights as kept
from transformer_fast.generation.decoder_state import decoder_state
from transformer_fast.generation.weights import set_weight_storage
from transformer_fast.ops.decoder_step import DecoderCopies
from transformer_fast.ops.decoder_tensors import Projection
from transformer_fast.ops.head_screen import HeadScreen
from transformer_fast.ops.recurrent_step import CellTensors, RecurrentSource, RecurrentTensors, RecurrentWeights

if native.load():
    pytest.skip(native.load(), allow_module_level=True)

WIDTH = 150  # more than a group of the int8 form


def decoder(vocabulary, change=None, bias=True, width=WIDTH):
    """A GRU without attention, with an embedding size of 9; the head reads its state."""
    g = torch.Generator().manual_seed(5)

    def draw(*shape):
        return torch.randn(*shape, generator=g)

    head, of_head = draw(vocabulary, width), draw(vocabulary) if bias else None
    if change is not None:
        change(head, of_head)
    cell = CellTensors(draw(3 * width, 9), draw(3 * width, width) / width**0.5)
    token = draw(9, 9)
    return RecurrentTensors(token, [cell], False, Projection((head,), (of_head,))), g


def both_ways(tensors, g, rows, barred=None, copied=False):
    """The tokens from all logits and from the screen, the fraction of logits that was computed, and both states."""
    weights = RecurrentWeights(tensors, DecoderCopies(tensors) if copied else None)
    screen = HeadScreen(tensors.head.weights[0])
    width = tensors.cells[0].weight_hh.shape[1]
    ids, state = torch.randint(9, (rows,), generator=g), (torch.randn(1, rows, width, generator=g), None, None)
    source = RecurrentSource(None, None, None, torch.arange(rows, dtype=torch.int32))
    logits = torch.full((rows, weights.vocabulary), math.nan)
    after = weights.step(ids, state, source, logits)
    if barred is not None:
        logits[:, barred[(barred >= 0) & (barred < logits.shape[1])]] = -math.inf
    tokens, computed, also = weights.choose(ids, state, source, screen, screen.bounds(weights.head_bias), barred)
    assert torch.equal(after[0].nan_to_num(), also[0].nan_to_num())
    return logits, tokens, computed


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("rows, vocabulary", [(1, 2000), (8, 1003), (27, 4097), (3, 5)])
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_the_token_is_that_of_all_logits(isa, rows, vocabulary, copied):
    for bias in (True, False):
        with running_on(isa):
            logits, tokens, computed = both_ways(*decoder(vocabulary, bias=bias), rows, copied=copied)
        assert torch.equal(tokens, logits.argmax(-1))
        assert 0 < computed <= (1 if vocabulary < 100 else 0.9)
    if rows == 1:
        assert computed < 0.2


def _outliers(head, bias):
    head[::7, ::11] *= 1e4


def _tiny(head, bias):
    head *= 1e-30
    bias *= 1e-30


def _huge(head, bias):
    head *= 1e30


def _equal(head, bias):
    head[:] = head[0]
    bias[:] = 3.0


def _far_bias(head, bias):
    bias += 1e6


def _zeros(head, bias):
    head.zero_()
    bias.zero_()


@pytest.mark.parametrize("change", [_outliers, _tiny, _huge, _equal, _far_bias, _zeros], ids=lambda f: f.__name__)
def test_weights_that_are_hard_to_screen(change):
    logits, tokens, _ = both_ways(*decoder(517, change), 6)
    assert torch.equal(tokens, logits.argmax(-1))


def test_an_infinite_bias_and_a_row_that_is_not_finite():
    def change(head, bias):
        bias[77], bias[78] = -math.inf, math.inf

    logits, tokens, _ = both_ways(*decoder(517, change), 3)
    assert tokens.tolist() == [78] * 3
    tensors, g = decoder(517)
    tensors.token[:] = math.nan  # all states and logits become NaN
    logits, tokens, computed = both_ways(tensors, g, 3)
    assert logits.isnan().all() and torch.equal(tokens, logits.argmax(-1)) and computed == 1

    def one(head, bias):
        bias[400] = math.nan

    logits, tokens, _ = both_ways(*decoder(517, one), 3)
    assert torch.equal(tokens, logits.argmax(-1)) and tokens.tolist() == [400] * 3


def test_barred_tokens():
    tensors, g = decoder(517)
    state = g.get_state()
    logits, _, _ = both_ways(tensors, g, 5)
    best = logits.topk(20, -1).indices.flatten().unique()
    barred = torch.cat([best, torch.tensor([-1, -33, 517, 10**9])])  # some are not in the vocabulary
    g.set_state(state)
    logits, tokens, _ = both_ways(tensors, g, 5, barred)
    assert torch.equal(tokens, logits.argmax(-1)) and not torch.isin(tokens, best).any()
    everything = torch.arange(517)
    assert both_ways(tensors, g, 5, everything)[1].tolist() == [0] * 5


@pytest.fixture
def chosen(monkeypatch):
    """The fraction of the logits that each step computes. Heads of any size are screened."""
    parts, choose = [], RecurrentWeights.choose

    def counted(self, *args):
        found = choose(self, *args)
        parts.append(found[1])
        return found

    monkeypatch.setattr(RecurrentWeights, "choose", counted)
    monkeypatch.setattr(kept, "_WORTH", 0)
    monkeypatch.setattr("transformer_fast.generation.native_recurrent_step._USELESS", 2.0)
    return parts


def source():
    inputs = batch()
    inputs.pop("labels")
    return inputs


@pytest.mark.parametrize("kind, cell", [("additive", "gru"), ("dot", "lstm"), ("peeky", "gru"), ("none", "lstm")])
def test_generate(kind, cell, chosen, monkeypatch):
    """Rows finish early and are dropped; a minimum length excludes the end token at first."""
    model = build(kind, cell, vocab_size=900)
    model.generation_config.eos_token_id = list(range(2, 400, 2))
    call = {**source(), "do_sample": False, "max_new_tokens": 12}
    for more in ({}, {"min_new_tokens": 5}, {"min_length": 4}):
        before = len(chosen)
        found = model.generate(**call, **more)
        assert len(chosen) > before
        with monkeypatch.context() as patch:
            patch.setattr(type(model), "_stepper", lambda *args: None)
            assert torch.equal(found, model.generate(**call, **more))


def test_what_takes_all_logits(chosen):
    model = build(vocab_size=900)
    call = {**source(), "max_new_tokens": 6}
    for more in ({"repetition_penalty": 1.3}, {"do_sample": True}, {"num_beams": 2}):
        model.generate(**call, **more)
    assert not chosen
    set_weight_storage(model, copy=False)  # no memory in addition to the model's
    model.generate(**call, do_sample=False)
    assert not chosen and decoder_state(model).screen is None
    set_weight_storage(model)
    model.generate(**call, do_sample=False)
    assert chosen and decoder_state(model).screen is not None


@pytest.mark.parametrize("copied", [None, True])
@torch.no_grad()
def test_weights_as_they_are_now(copied, chosen):
    model = build(vocab_size=900)
    set_weight_storage(model, copy=copied)
    call = {**source(), "do_sample": False, "min_new_tokens": 6, "max_new_tokens": 6}
    model.generate(**call)
    first = decoder_state(model).screen
    model.generate(**call)
    assert decoder_state(model).screen is first is not None
    model.lm_head.weight.numpy()[333] = 0.0  # a write that torch's version counters do not see
    model.lm_head.bias.numpy()[333] = 50.0
    assert (model.generate(**call)[:, 1:] == 333).all() and decoder_state(model).screen is not first
    model.lm_head.weight.numpy()[7, 3] = math.inf
    assert not model.generate(**call).eq(333).all() and decoder_state(model).screen is None


def test_a_screen_that_screens_nothing_is_left(chosen, monkeypatch):
    monkeypatch.setattr("transformer_fast.generation.native_recurrent_step._USELESS", 0.5)
    model = build(vocab_size=900)
    with torch.no_grad():
        model.lm_head.weight[:] = model.lm_head.weight[0]  # all logits are equal
    model.generate(**source(), do_sample=False, min_new_tokens=6, max_new_tokens=6)
    assert len(chosen) == 1 and chosen[0] > 0.5


def test_a_small_head_is_not_screened():
    model = build()
    assert model.generate(**source(), do_sample=False, max_new_tokens=4).shape[1] <= 5
    assert decoder_state(model).screen is None
