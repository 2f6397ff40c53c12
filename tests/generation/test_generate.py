"""generate() returns Hugging Face's tokens for greedy decoding, sampling and beam search, on many tiny random
models."""

import copy

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import transformer_fast
from transformer_fast.generation import GenerationMixin, choose_stepper
from transformer_fast.generation.model_step import ModelStepper

pytestmark = pytest.mark.usefixtures("one_thread")
VOCABULARY = 83


class Bart(GenerationMixin, transformers.BartForConditionalGeneration):
    """Hugging Face's own encoder-decoder on this engine."""

    _shares_encoder_keys = False


def configuration(family: str, seed: int = 0):
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": VOCABULARY}
    heads = 1 + seed % 3
    if family == "bart":
        return transformers.BartConfig(
            d_model=8 * heads, encoder_layers=1, decoder_layers=2, encoder_attention_heads=heads,
            decoder_attention_heads=heads, encoder_ffn_dim=20, decoder_ffn_dim=20, max_position_embeddings=64,
            decoder_start_token_id=2, forced_eos_token_id=None, **special,
        )  # fmt: skip
    kind = transformers.GPT2Config if family.startswith("gpt2") else transformers.OpenAIGPTConfig
    cross = {"add_cross_attention": True} if family == "gpt2 cross" else {}
    return kind(n_positions=64, n_embd=9 * heads, n_head=heads, n_layer=1 + seed % 2, **special, **cross)


CLASSES = {
    "gpt2": (transformer_fast.GPT2LMHeadModel, transformers.GPT2LMHeadModel),
    "gpt2 cross": (transformer_fast.GPT2LMHeadModel, transformers.GPT2LMHeadModel),
    "openai-gpt": (transformer_fast.OpenAIGPTLMHeadModel, transformers.OpenAIGPTLMHeadModel),
    "bart": (Bart, transformers.BartForConditionalGeneration),
}


def models(family: str, seed: int = 0, dtype=torch.float64):
    """(ours, HF's) with the same random weights, in float64 so that rounding does not decide near ties."""
    torch.manual_seed(seed)
    ours_class, theirs_class = CLASSES[family]
    theirs = theirs_class(configuration(family, seed)).to(dtype).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.25)
        theirs.get_output_embeddings().weight[2] *= 1.5  # sequences end at different lengths
    ours = ours_class(copy.deepcopy(theirs.config)).to(dtype).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def prompts(family: str, padding: str = "none", rows: int = 4, length: int = 7) -> dict:
    ids = torch.randint(3, VOCABULARY, (rows, length))
    mask = torch.ones_like(ids)
    for row in range(rows):
        drop = (0, 3, 6, 1)[row % 4]
        if padding == "left":
            mask[row, :drop] = 0
        elif padding == "right":
            mask[row, length - drop :] = 0
    found = {"input_ids": ids * mask, "attention_mask": mask}
    if family == "gpt2 cross":
        found["encoder_hidden_states"] = torch.randn(rows, 5, 9, dtype=torch.float64)
        found["encoder_attention_mask"] = torch.tensor([[1] * 5, [1, 1, 0, 0, 0], [1] * 5, [1, 1, 1, 1, 0]])[:rows]
    return found


def both(ours, theirs, inputs: dict, seed: int = 5, **options):
    found = []
    for model in (ours, theirs):
        torch.manual_seed(seed)
        found.append(model.generate(**inputs, **options))
    return found


@pytest.fixture
def by_engine(monkeypatch):
    """The calls that the engine ran."""
    taken = []

    def choose(model, prompt):
        taken.append(choose_stepper(model, prompt))
        return taken[-1]

    monkeypatch.setattr("transformer_fast.generation.mixin.choose_stepper", choose)
    return taken


SETTINGS = {
    "greedy": {},
    "greedy, min and max": {"min_new_tokens": 5, "max_new_tokens": 9},
    "sampled": {"do_sample": True},
    "top-k": {"do_sample": True, "top_k": 7, "temperature": 1.7, "num_return_sequences": 3},
    "top-p": {"do_sample": True, "top_p": 0.6, "top_k": 0, "temperature": 0.8},
    "typical": {"do_sample": True, "typical_p": 0.5, "top_k": 0},
    "min-p": {"do_sample": True, "min_p": 0.05, "top_k": 0},
    "repetition": {"repetition_penalty": 1.6, "no_repeat_ngram_size": 2},
    "bad words": {"bad_words_ids": [[5], [7, 9]], "suppress_tokens": [11, 12], "begin_suppress_tokens": [2]},
    "forced": {"forced_bos_token_id": 17, "forced_eos_token_id": 2},
    "renormalised": {"renormalize_logits": True, "remove_invalid_values": True, "temperature": 0.7, "do_sample": True},
    "cut off": {"do_sample": True, "epsilon_cutoff": 0.01, "eta_cutoff": 0.02, "top_k": 0},
    "biased": {"sequence_bias": {(40,): 2.0, (5, 6): -9.0}, "exponential_decay_length_penalty": (2, 1.05)},
    "several ends": {"eos_token_id": [2, 30, 31, 32]},
    "no end": {"eos_token_id": None},
    "beams": {"num_beams": 3},
    "beams, n best": {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 2.0},
    "beams, short": {"num_beams": 3, "length_penalty": -1.0, "early_stopping": True},
    "beams, never early": {"num_beams": 3, "early_stopping": "never", "length_penalty": 1.5},
    "beams, sampled": {"num_beams": 3, "do_sample": True, "temperature": 1.3, "num_return_sequences": 2},
    "beams, processed": {"num_beams": 3, "no_repeat_ngram_size": 2, "min_new_tokens": 4, "bad_words_ids": [[5]]},
    "beams, several ends": {"num_beams": 2, "eos_token_id": [2, 30, 31]},
}


@pytest.mark.quick
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("family", ["gpt2", "openai-gpt", "bart"])
def test_same_tokens(family, name, by_engine):
    options = {"max_new_tokens": 14} | SETTINGS[name]
    case = list(SETTINGS).index(name) + list(CLASSES).index(family)
    ours, theirs = models(family, case)
    a, b = both(ours, theirs, prompts(family, ("none", "left", "right")[case % 3]), **options)
    assert torch.equal(a, b) and len(by_engine) == 1


@settings(max_examples=16, deadline=None, derandomize=True)
@given(st.data())
def test_same_tokens_of_random_models(data):
    family = data.draw(st.sampled_from(["gpt2", "openai-gpt", "bart"]))
    ours, theirs = models(family, data.draw(st.integers(0, 1000)))
    inputs = prompts(family, data.draw(st.sampled_from(["none", "left", "right"])), data.draw(st.integers(1, 6)),
                     data.draw(st.integers(1, 9)))  # fmt: skip
    inputs["attention_mask"][:, 0 if inputs["attention_mask"][:, 0].any() else -1] = 1  # no prompt is empty
    empty = ~inputs["attention_mask"].bool().any(1)
    inputs["attention_mask"][empty] = 1
    beams = data.draw(st.integers(1, 5))
    sampled = data.draw(st.booleans())
    options = {
        "max_new_tokens": data.draw(st.integers(1, 12)), "num_beams": beams, "do_sample": sampled,
        "num_return_sequences": data.draw(st.integers(1, beams if beams > 1 else 3 if sampled else 1)),
    }  # fmt: skip
    if beams > 1:
        options["length_penalty"] = data.draw(st.sampled_from([-1.0, 0.0, 1.0, 2.5]))
        options["early_stopping"] = data.draw(st.sampled_from([True, False, "never"]))
    a, b = both(ours, theirs, inputs, **options)
    assert torch.equal(a, b)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=str)
@pytest.mark.parametrize("family", ["gpt2", "openai-gpt"])
def test_float32(family, options, by_engine):
    """In float32, with the kernels of this machine."""
    ours, theirs = models(family, 2, torch.float32)
    for padding in ("none", "left"):
        a, b = both(ours, theirs, prompts(family, padding), max_new_tokens=12, **options)
        assert torch.equal(a, b)
    assert len(by_engine) == 2


@pytest.mark.parametrize("name", ["greedy", "top-k", "beams", "beams, n best"])
def test_cross_attention_of_a_decoder(name, by_engine):
    """Rows of one prompt share the encoder's keys. Hugging Face's model runs with use_cache=False."""
    options = {"max_new_tokens": 9, **SETTINGS[name]}
    ours, theirs = models("gpt2 cross")
    inputs = prompts("gpt2 cross", "left")
    a = both(ours, theirs, inputs, **options)[0]
    torch.manual_seed(5)
    assert torch.equal(a, theirs.generate(**inputs, use_cache=False, **options))
    assert len(by_engine) == 1


@pytest.mark.parametrize("family", ["gpt2", "bart"])
@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 3}], ids=str)
def test_outputs_as_a_dict(family, options, by_engine):
    ours, theirs = models(family)
    a, b = both(
        ours, theirs, prompts(family, "left"), max_new_tokens=10, return_dict_in_generate=True, output_scores=True,
        output_logits=True, repetition_penalty=1.2, **options,
    )  # fmt: skip
    assert by_engine and type(a) is type(b) and list(a.keys()) == list(b.keys())
    assert torch.equal(a.sequences, b.sequences)
    for name in ("scores", "logits"):
        assert len(a[name]) == len(b[name])
        for x, y in zip(a[name], b[name]):
            torch.testing.assert_close(x, y)
    for name in ("sequences_scores", "beam_indices"):
        if name in b:
            torch.testing.assert_close(a[name], b[name])
    extra = {"beam_indices": a.beam_indices} if "num_beams" in options else {}
    transitions = [m.compute_transition_scores(o.sequences, o.scores, **extra) for m, o in ((ours, a), (theirs, b))]
    torch.testing.assert_close(*transitions)
    cache, expected = a.past_key_values, b.past_key_values
    assert type(cache) is type(expected) and cache.get_seq_length() == expected.get_seq_length()
    cache, expected = (getattr(c, "self_attention_cache", c) for c in (cache, expected))
    seen = slice(7, None) if family == "gpt2" else slice(None)  # ours has zeros for padding
    for x, y in zip(cache.layers, expected.layers):
        torch.testing.assert_close(x.keys[:, :, seen], y.keys[:, :, seen])


@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_going_on_from_a_returned_cache(family):
    ours, theirs = models(family)
    inputs = prompts(family)
    options = {"return_dict_in_generate": True, "eos_token_id": None}
    results = []
    for model in (ours, theirs):
        first = model.generate(**inputs, max_new_tokens=5, **options)
        if family == "bart":
            again = {**inputs, "decoder_input_ids": first.sequences}
        else:
            again = {"input_ids": first.sequences}
        results.append(model.generate(**again, past_key_values=first.past_key_values, max_new_tokens=5, **options))
    assert torch.equal(results[0].sequences, results[1].sequences)


HUGGING_FACES = {
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "attentions": {"output_attentions": True, "return_dict_in_generate": True},
    "hidden states": {"output_hidden_states": True, "return_dict_in_generate": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "chunks": {"prefill_chunk_size": 3},
    "no cache, beams": {"use_cache": False, "num_beams": 2},
}


@pytest.mark.parametrize("name", HUGGING_FACES)
def test_what_goes_to_hugging_faces_loop(name, by_engine):
    ours, theirs = models("gpt2")
    theirs.set_attn_implementation("eager")  # otherwise it returns no attentions
    rows = 1 if name == "prompt lookup" else 3
    a, b = both(ours, theirs, prompts("gpt2", rows=rows), max_new_tokens=8, **HUGGING_FACES[name])
    assert not by_engine
    if isinstance(b, torch.Tensor):
        assert torch.equal(a, b)
        return
    assert torch.equal(a.sequences, b.sequences)
    kind = "attentions" if name == "attentions" else "hidden_states"
    assert [[t.shape for t in step] for step in a[kind]] == [[t.shape for t in step] for step in b[kind]]


def test_a_users_cache_is_filled():
    ours, theirs = models("gpt2")
    inputs = prompts("gpt2")
    caches = [transformers.DynamicCache(config=m.config) for m in (ours, theirs)]
    a, b = (m.generate(**inputs, max_new_tokens=6, past_key_values=c) for m, c in zip((ours, theirs), caches))
    assert torch.equal(a, b) and caches[0].get_seq_length() == caches[1].get_seq_length() > 7


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
def test_inputs_embeds_and_token_types(options, by_engine):
    ours, theirs = models("gpt2")
    ids, mask = prompts("gpt2", "left").values()
    found = []
    for model in (ours, theirs):
        embedded = {"inputs_embeds": model.get_input_embeddings()(ids).detach(), "attention_mask": mask}
        found.append(model.generate(**embedded, max_new_tokens=8, **options))
    assert torch.equal(*found) and found[0].shape[1] <= 8
    kinds = torch.randint(3, VOCABULARY, ids.shape)
    a, b = both(ours, theirs, {"input_ids": ids, "attention_mask": mask, "token_type_ids": kinds}, **options)
    assert torch.equal(a, b) and len(by_engine) == 2


def test_from_nothing_but_the_first_token(by_engine):
    ours, theirs = models("gpt2")
    assert torch.equal(ours.generate(max_new_tokens=6), theirs.generate(max_new_tokens=6)) and by_engine


def test_processors_and_criteria_of_the_users(by_engine):
    """Users' processors and criteria are called with the same arguments in the same order as by Hugging Face's loop."""
    ours, theirs = models("gpt2")
    inputs = prompts("gpt2", "left")

    class Seen(transformers.LogitsProcessor):
        def __init__(self):
            self.calls = []

        def __call__(self, input_ids, scores):
            self.calls.append((input_ids.clone(), scores.dtype, scores.shape))
            scores[:, 40] += 3 * (input_ids.shape[1] - 12)  # in place, as users may
            return scores

    class Stop(transformers.StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return (input_ids[:, 7:] == 40).any(1) | torch.full((len(input_ids),), input_ids.shape[1] >= 16)

    for options in ({}, {"num_beams": 2}):
        seen, found = [Seen(), Seen()], []
        for model, processor in zip((ours, theirs), seen):
            found.append(
                model.generate(
                    **inputs, max_new_tokens=12, logits_processor=[processor], stopping_criteria=[Stop()],
                    prefix_allowed_tokens_fn=lambda row, ids: list(range(row, VOCABULARY)), **options,
                )
            )  # fmt: skip
        assert torch.equal(*found) and len(seen[0].calls) == len(seen[1].calls) > 1
        for a, b in zip(seen[0].calls, seen[1].calls):
            assert torch.equal(a[0], b[0]) and a[1:] == b[1:]
    assert len(by_engine) == 2


def test_guidance_by_another_prompt(by_engine):
    """A processor that calls the model with its own cache."""
    ours, theirs = models("gpt2")
    negative = {"negative_prompt_ids": torch.randint(3, VOCABULARY, (4, 5)), "guidance_scale": 1.4}
    a, b = both(ours, theirs, prompts("gpt2"), max_new_tokens=9, **negative)
    assert torch.equal(a, b) and by_engine


def test_streamers():
    class Kept(transformers.generation.BaseStreamer):
        def __init__(self):
            self.parts, self.ended = [], False

        def put(self, value):
            self.parts.append(value.clone())

        def end(self):
            self.ended = True

    ours, theirs = models("gpt2")
    kept = [Kept(), Kept()]
    for model, streamer in zip((ours, theirs), kept):
        model.generate(**prompts("gpt2", rows=1), max_new_tokens=6, streamer=streamer)
    # prompts() draws new prompts, so compare what one model streams with what it returns.
    out = ours.generate(**(one := prompts("gpt2", rows=1)), max_new_tokens=6, streamer=(again := Kept()))
    assert torch.equal(torch.cat([p.flatten() for p in again.parts]), out.flatten()) and again.ended
    assert torch.equal(again.parts[0], one["input_ids"]) and kept[0].ended and kept[1].ended
    with pytest.raises(ValueError, match="`streamer` cannot be used with beam search"):
        ours.generate(**one, num_beams=2, streamer=Kept())


def test_generators_of_rows():
    """A row with its own generator gets the same tokens alone, in a batch, and at another place in the batch."""
    ours, _ = models("gpt2")
    ids = prompts("gpt2")["input_ids"]
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 12, "pad_token_id": 0}

    def draws(rows):
        generators = [torch.Generator().manual_seed(100 + r) for r in rows]
        return ours.generate(ids[rows], generators=generators, **options)

    whole = draws([0, 1, 2, 3])
    torch.rand(7)  # the global generator is not used
    for rows in ([2], [3, 0], [1, 2, 3]):
        part = draws(rows)
        for found, row in zip(part, rows):
            wanted = whole[row, : len(found)]
            assert torch.equal(found[: len(wanted)], wanted)
    assert len({tuple(r.tolist()) for r in whole}) == 4
    with pytest.raises(ValueError, match="generators: wanted one for each of the 4 rows"):
        ours.generate(ids, do_sample=True, generators=[torch.Generator()])
    with pytest.raises(ValueError, match="do_sample=False"):
        ours.generate(ids, generators=[torch.Generator()] * 4)
    with pytest.raises(ValueError, match="generators: only for sampling without beams"):
        ours.generate(ids, num_beams=2, do_sample=True, generators=[torch.Generator()] * 4)
    with pytest.raises(ValueError, match="generators: can only be used with the cache that generate creates"):
        ours.generate(ids, do_sample=True, use_cache=False, generators=[torch.Generator()] * 4)


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 3, "early_stopping": True}], ids=str)
@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_finished_rows_are_no_longer_computed(family, options, monkeypatch):
    ours, theirs = models(family, 1)
    rows = []
    step = ModelStepper.step

    def counted(stepper, tokens):
        rows.append(len(tokens))
        return step(stepper, tokens)

    monkeypatch.setattr(ModelStepper, "step", counted)

    class Staggered(transformers.StoppingCriteria):
        eos_token_id = 2

        def __call__(self, input_ids, scores, **kwargs):
            per_prompt = len(input_ids) // 6
            start = 7 if family == "gpt2" else 1
            row = torch.arange(len(input_ids)) // per_prompt
            return torch.tensor(input_ids.shape[1] - start) >= torch.tensor([9, 2, 12, 3, 5, 1])[row]

    inputs = prompts(family, "left", rows=6)
    a, b = both(ours, theirs, inputs, max_new_tokens=12, stopping_criteria=[Staggered()], eos_token_id=None,
                pad_token_id=0, **options)  # fmt: skip
    assert torch.equal(a, b)
    assert rows[0] == 6 * options.get("num_beams", 1) and rows[-1] < rows[0] / 2


@pytest.mark.parametrize("family", ["gpt2", "bart"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_a_prompt_whose_mask_keeps_nothing(family, options):
    """As in HF: the first new token attends to no prompt token."""
    ours, theirs = models(family, 3)
    inputs = prompts(family, "none", rows=3)
    inputs["attention_mask"][1] = 0
    a, b = both(ours, theirs, inputs, max_new_tokens=5, pad_token_id=0, **options)
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    "call, message",
    [
        ({"inputs": torch.zeros(0, 3, dtype=torch.long)}, "inputs: wanted at least one prompt"),
        ({"inputs": torch.zeros(2, 0, dtype=torch.long)}, "inputs: wanted prompts of at least one token"),
        ({"inputs": torch.ones(1, 65, dtype=torch.long), "max_new_tokens": 2}, "n_positions"),
        ({"inputs": torch.ones(1, 62, dtype=torch.long), "max_new_tokens": 9, "eos_token_id": None}, "n_positions"),
        ({"inputs": torch.ones(1, 3, dtype=torch.long), "num_return_sequences": 2}, "num_return_sequences"),
        (
            {"inputs": torch.ones(1, 3, dtype=torch.long), "num_beams": 2, "num_return_sequences": 3},
            "num_return_sequences",
        ),
        ({"inputs": torch.ones(1, 3, dtype=torch.long), "max_new_tokens": 0}, "max_new_tokens"),
        ({"inputs": torch.ones(1, 3, dtype=torch.long), "beams": 2}, "beams"),
        ({"inputs": torch.ones(1, 3, dtype=torch.long), "num_beams": 0}, "num_beams: wanted at least 1, got 0"),
        ({"inputs": torch.ones(3, dtype=torch.long)}, r"inputs: wanted shape \(batch, length\), got \(3,\)"),
        ({"inputs": torch.ones(1, 2, 3, dtype=torch.long)}, r"inputs: wanted shape \(batch, length\)"),
        (
            {"inputs": torch.ones(1, 3, dtype=torch.long), "attention_mask": torch.ones(1, 2)},
            r"attention_mask: wanted shape \(1, 3\) as the ids, got \(1, 2\)",
        ),
    ],
)
def test_bad_input(call, message):
    ours, _ = models("gpt2")
    with pytest.raises(ValueError, match=message):
        ours.generate(**call)


@pytest.mark.parametrize(
    "call, message",
    [
        ({"inputs": "text"}, "inputs: wanted a tensor, got str$"),
        (
            {"inputs": transformers.BatchEncoding({"input_ids": torch.ones(1, 3, dtype=torch.long)})},
            r"inputs: wanted a tensor, got BatchEncoding; pass a tokenizer's output as generate\(\*\*batch\)",
        ),
        ({"input_ids": [[1, 2]]}, "input_ids: wanted a tensor, got list"),
        (
            {"inputs": torch.ones(1, 3, dtype=torch.long), "generators": 3},
            "generators: wanted a list of torch.Generator",
        ),
    ],
)
def test_input_of_another_type(call, message):
    ours, _ = models("gpt2")
    with pytest.raises(TypeError, match=message):
        ours.generate(**call)
