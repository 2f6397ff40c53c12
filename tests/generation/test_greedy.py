"""Greedy decoding and beams by the stepper's own choice of tokens: tokens as of Hugging Face."""

import copy

import pytest
import torch
import transformers as hf
from transformers.generation import stopping_criteria as criteria

import transformer_fast as tf
from transformer_fast.backends import native
from transformer_fast.generation.decoder_state import decoder_state
from transformer_fast.generation.greedy import known_ends
from transformer_fast.ops.decoder_step import DecoderCache

if native.load():
    pytest.skip(native.load(), allow_module_level=True)

VOCABULARY = 300
_SEQ2SEQ = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 40,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "init_std": 0.5,
}  # fmt: skip
_GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.5}  # fmt: skip
_KINDS = {
    "gpt2": ("GPT2LMHeadModel", lambda: hf.GPT2Config(**_GPT)),
    "bart": ("BartForConditionalGeneration", lambda: hf.BartConfig(**_SEQ2SEQ, forced_eos_token_id=2)),
    "mbart": ("MBartForConditionalGeneration", lambda: hf.MBartConfig(**_SEQ2SEQ, forced_eos_token_id=2)),
}


def models(kind: str):
    name, config = _KINDS[kind]
    torch.manual_seed(3)
    ours = getattr(tf, name)(config()).eval()
    theirs = getattr(hf, name)(copy.deepcopy(ours.config)).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def prompts(rows=5, length=6):
    torch.manual_seed(4)
    ids = torch.randint(3, VOCABULARY, (rows, length))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return {"input_ids": ids.where(mask.bool(), 0), "attention_mask": mask, "pad_token_id": 0}


@pytest.fixture
def asked(monkeypatch):
    """The calls of the native step, by name."""
    calls = []
    for name in ("step", "choose", "rank"):
        run = getattr(DecoderCache, name)
        monkeypatch.setattr(DecoderCache, name, lambda *a, n=name, f=run: (calls.append(n), f(*a))[1])
    return calls


def ends_of(model, inputs, count: int) -> list[int]:
    """Tokens that a greedy continuation has in some rows early, others late."""
    found = model.generate(**inputs, max_new_tokens=count, eos_token_id=None, forced_eos_token_id=None)
    return [int(found[0, -count + 2]), int(found[2, -count + 4]), int(found[3, -2])]


@pytest.mark.parametrize("kind", _KINDS)
def test_greedy(kind, asked):
    ours, theirs = models(kind)
    inputs = prompts()
    ends = ends_of(theirs, inputs, 12)
    settings = [
        {"eos_token_id": None, "forced_eos_token_id": None},
        {"eos_token_id": ends},
        {"eos_token_id": ends, "min_new_tokens": 5},
        {"eos_token_id": [*ends, VOCABULARY + 9], "min_length": 9, "forced_eos_token_id": None},
        {"eos_token_id": ends[:1], "forced_bos_token_id": 7},
    ]
    for options in settings:
        wanted = theirs.generate(**inputs, max_new_tokens=12, **options)
        asked.clear()
        assert torch.equal(ours.generate(**inputs, max_new_tokens=12, **options), wanted), options
        assert asked.count("choose") > 3 and asked.count("step") <= 2


@pytest.mark.parametrize("kind", _KINDS)
def test_beams(kind, asked):
    ours, theirs = models(kind)
    inputs = prompts()
    for options in (
        {},
        {"min_new_tokens": 6},
        {"eos_token_id": ends_of(theirs, inputs, 12), "num_return_sequences": 2},
    ):
        options = {"num_beams": 3, "max_new_tokens": 12, **options}
        wanted = theirs.generate(**inputs, **options)
        asked.clear()
        assert torch.equal(ours.generate(**inputs, **options), wanted), options
        assert asked.count("rank") > 3 and asked.count("step") <= 3


def test_what_has_to_see_the_logits_gets_them(asked):
    ours, theirs = models("gpt2")
    inputs = prompts()
    for options in (
        {"repetition_penalty": 1.3}, {"max_time": 900.0}, {"num_beams": 2, "repetition_penalty": 1.3},
        {"num_beams": 2, "no_repeat_ngram_size": 2},
    ):  # fmt: skip
        asked.clear()
        wanted = theirs.generate(**inputs, max_new_tokens=8, **options)
        assert torch.equal(ours.generate(**inputs, max_new_tokens=8, **options), wanted), options
        assert asked == ["step"] * 7 or "num_beams" in options and "max_time" not in options and "rank" not in asked
    scores = ours.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True, output_scores=True).scores
    assert len(scores) == 4 and scores[0].shape == (5, VOCABULARY)


def test_streamed_tokens():
    class Seen(hf.generation.BaseStreamer):
        def __init__(self):
            self.parts, self.ended = [], 0

        def put(self, value):
            self.parts.append(value.flatten().tolist())

        def end(self):
            self.ended += 1

    inputs, seen = prompts(), [Seen(), Seen()]
    ends = ends_of(models("gpt2")[1], inputs, 12)
    for model, streamer in zip(models("gpt2"), seen):
        model.generate(**inputs, max_new_tokens=12, eos_token_id=ends, streamer=streamer)
    assert seen[0].parts == seen[1].parts and seen[0].ended == seen[1].ended == 1


def test_memory_of_a_cache_serves_the_next():
    """And what a call returns is not in it."""
    ours, _ = models("gpt2")
    inputs = prompts()
    first = ours.generate(**inputs, max_new_tokens=8, return_dict_in_generate=True)
    kept = decoder_state(ours).memory
    blocks = {b.data_ptr() for b in kept._blocks}
    assert blocks
    keys = [layer.keys.clone() for layer in first.past_key_values.layers]
    tokens = first.sequences.clone()
    torch.manual_seed(9)
    other = torch.randint(3, VOCABULARY, (5, 6))
    ours.generate(other, max_new_tokens=8, pad_token_id=0)
    assert blocks & {b.data_ptr() for b in kept._blocks}
    assert torch.equal(first.sequences, tokens)
    assert all(torch.equal(layer.keys, k) for layer, k in zip(first.past_key_values.layers, keys))


def test_known_ends():
    both = criteria.StoppingCriteriaList([criteria.MaxLengthCriteria(9), criteria.EosTokenCriteria([2, 5])])
    assert known_ends(both) == (9, {2, 5})
    assert known_ends(criteria.StoppingCriteriaList([criteria.MaxLengthCriteria(9, 12)])) == (9, set())

    class Own(criteria.EosTokenCriteria):
        pass

    for unknown in (
        [criteria.EosTokenCriteria(2)],  # no greatest length
        [criteria.MaxLengthCriteria(9, 8)],  # it warns
        [criteria.MaxLengthCriteria(9), Own(2)],
        [criteria.MaxLengthCriteria(9), criteria.MaxTimeCriteria(60.0)],
    ):
        assert known_ends(criteria.StoppingCriteriaList(unknown)) is None
    assert known_ends([criteria.MaxLengthCriteria(9)]) is None
