"""verify compares the tokens of Hugging Face's loop and of ours, and distinguishes differences from ties."""

import copy

import pytest
import torch
from hf_models import DECODERS, SEQ2SEQ

import transformer_fast
from transformer_fast import verify_tokens
from transformer_fast.verify import verify

PROMPTS = torch.tensor([[5, 6, 7, 8, 9], [0, 0, 10, 11, 12], [0, 0, 0, 0, 13]])


def _inputs(padding: str) -> dict[str, torch.Tensor]:
    ids = PROMPTS if padding == "left" else PROMPTS.flip(1)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


@pytest.fixture(scope="module")
def gpt2():
    return DECODERS["gpt2"]()


def _change(monkeypatch, by):
    """Change the last column of the tokens of our loop."""
    from transformer_fast.generation import mixin

    right = mixin.sample

    def wrong(stepper, *args, **kwargs):
        found = right(stepper, *args, **kwargs)
        found[1, -1] = by(found[1, -1])
        return found

    monkeypatch.setattr(mixin, "sample", wrong)


@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_verify_compares_tokens(family, tmp_path):
    {**DECODERS, **SEQ2SEQ}[family]().save_pretrained(tmp_path)
    result = verify(tmp_path, dtypes=["fp32"], gradients=False)
    rows = [row for row in result.rows if row.what.startswith("tokens")]
    assert [(row.what, row.same, row.note) for row in rows] == [(f"tokens, {m}", True, "") for m in verify_tokens.MODES]
    assert rows[0].padding == ("left" if family == "gpt2" else "right")
    assert result.same and result.release == __import__("transformers").__version__
    without = verify(tmp_path, dtypes=["fp32"], gradients=False, tokens=False)
    assert len(without.rows) == len(result.rows) - 3


def test_wrong_tokens_are_not_the_same(tmp_path, gpt2, monkeypatch):
    gpt2.save_pretrained(tmp_path)
    _change(monkeypatch, lambda token: (token + 7) % 61)
    result = verify(tmp_path, dtypes=["fp32"], gradients=False)
    rows = {row.what: row for row in result.rows if row.what.startswith("tokens")}
    assert not result.same
    assert not rows["tokens, greedy"].same and not rows["tokens, sampled"].same and rows["tokens, 3 beams"].same
    assert rows["tokens, greedy"].note == "1 of 4 rows: sentence 1 from new token 7"


def test_a_tie_is_no_fault(gpt2, monkeypatch):
    """Another token counts as a tie only if its float64 score is within the rounding error."""
    ours = transformer_fast.GPT2LMHeadModel(copy.deepcopy(gpt2.config)).eval()
    ours.load_state_dict(gpt2.state_dict())
    reference, inputs = copy.deepcopy(gpt2).double(), _inputs("left")
    greedy = verify_tokens._generate(gpt2, inputs, verify_tokens.MODES["greedy"])
    scores = verify_tokens._log_probabilities(reference, inputs, 1, greedy[1])[-1]
    best, second = scores.topk(2)
    assert best[0] == scores[greedy[1, -1]], "the reference is at the token that was generated"
    _change(monkeypatch, lambda token: int(second[1]) if token == second[0] else token)
    gap = (best[0] - best[1]).item()
    for error, same in ((gap, True), (gap / 100, False)):
        found = next(verify_tokens.compare_tokens(gpt2, ours, reference, inputs, error))
        assert found.mode == "greedy" and found.same is same
        assert ("a tie within rounding at new token 7" in found.note) == same


@pytest.mark.parametrize("family, padding", [("gpt2", "left"), ("marian", "right")])
def test_draws_of_sampling_are_known_again(family, padding):
    """In float64, the largest log p - log q is the token that Hugging Face draws, in every row and step."""
    model, inputs = {**DECODERS, **SEQ2SEQ}[family](), _inputs(padding)
    tokens = verify_tokens._generate(model, inputs, verify_tokens.MODES["sampled"])
    reference = copy.deepcopy(model).double()
    for row in range(len(tokens)):
        scores = verify_tokens._log_probabilities(reference, inputs, row, tokens[row])
        scores[:, [model.generation_config.pad_token_id, model.generation_config.eos_token_id]] = -torch.inf
        for step in range(verify_tokens.NEW_TOKENS):
            q = verify_tokens._draws(len(tokens), scores[step], step)[row]
            assert (scores[step] - q.log()).argmax() == tokens[row, step], (row, step)
