"""In-place processors give the results of Hugging Face's. All other processors are called unchanged."""

import pytest
import torch
from transformers.generation import logits_process as hf

from transformer_fast.generation.processors import in_place


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
