"""In-place processors give the results of Hugging Face's. All other processors are called unchanged."""

import math

import pytest
import torch
from transformers.generation import logits_process as hf

from transformer_fast.generation.processors import bar, in_place, known_rules


@pytest.mark.parametrize("length", [3, 6, 9])
@pytest.mark.parametrize("eos", [5, [5, 7], torch.tensor([2])], ids=str)
def test_same_scores(length, eos):
    made = hf.LogitsProcessorList([
        hf.MinLengthLogitsProcessor(7, eos),
        hf.RepetitionPenaltyLogitsProcessor(1.3),
        hf.MinNewTokensLengthLogitsProcessor(2, 4, eos),
        hf.TopKLogitsWarper(6),
    ])  # fmt: skip
    ids, scores = torch.randint(0, 11, (4, length)), torch.randn(4, 11)
    wanted = made(ids, scores.clone())
    assert torch.equal(in_place(made)(ids, scores.clone()), wanted)


def test_others_are_called_as_they_are():
    class Own(hf.MinLengthLogitsProcessor):
        pass

    own = hf.LogitsProcessorList([Own(5, 1), hf.TopKLogitsWarper(2)])
    assert in_place(own) is own
    empty = hf.LogitsProcessorList()
    assert in_place(empty) is empty


@pytest.mark.parametrize("length", [1, 3, 6, 8, 9])
@pytest.mark.parametrize("eos", [5, [5, 7, 40], torch.tensor([2])], ids=str)
def test_rules_say_what_the_processors_do(length, eos):
    """Tokens past the vocabulary, 11 here, bar nothing."""
    eos_inside = [e for e in torch.as_tensor(eos).reshape(-1).tolist() if e < 11]
    made = hf.LogitsProcessorList([
        hf.MinLengthLogitsProcessor(7, eos),
        hf.MinNewTokensLengthLogitsProcessor(2, 4, eos),
        hf.ForcedBOSTokenLogitsProcessor(3),
        hf.ForcedEOSTokenLogitsProcessor(10, eos_inside),
    ])  # fmt: skip
    ids, scores = torch.randint(0, 11, (4, length)), torch.randn(4, 11)
    wanted, rules = made(ids, scores.clone()), known_rules(made)
    forced = rules.forced(length)
    if forced is None:
        assert torch.equal(bar(scores.clone(), rules.barred(length)), wanted)
    else:
        assert wanted.isfinite().any(0).nonzero().flatten().tolist() == sorted(forced.tolist())
    assert (forced is not None) == (length in (1, 9))


def test_no_rules_of_what_has_to_see_the_scores():
    assert known_rules([]).barred(3) is None and known_rules(None).forced(3) is None
    least, end = hf.MinLengthLogitsProcessor(7, 1), hf.ForcedEOSTokenLogitsProcessor(10, 1)

    class Own(hf.MinLengthLogitsProcessor):
        pass

    for processors in ([Own(7, 1)], [least, hf.TopKLogitsWarper(2)], [end, least]):
        assert known_rules(hf.LogitsProcessorList(processors)) is None
    assert known_rules([least]) is None  # a list of another kind may call them in its own way
    assert known_rules(hf.LogitsProcessorList([least, end])) is not None


def test_tokens_outside_are_not_barred():
    scores = torch.zeros(2, 5)
    bar(scores, torch.tensor([-1, 3, 5]))
    assert scores.tolist() == [[0, 0, 0, -math.inf, 0]] * 2
