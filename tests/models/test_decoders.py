"""Decoders equal Hugging Face's: outputs and gradients on every row of ragged batches, caches, windows, generated
tokens, checkpoints."""

import decoder_cases
import pytest
import torch
import transformers
from decoder_cases import FAMILIES, SWITCHES, VOCABULARY
from numerics import GRADIENT, OUTPUT, assert_as_accurate, pooled

import transformer_fast

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
pytestmark = pytest.mark.usefixtures("one_thread")
HEADS = {
    "Model": ("last_hidden_state",),
    "ForCausalLM": ("logits", "loss"),
    "ForSequenceClassification": ("logits", "loss"),
    "ForTokenClassification": ("logits", "loss"),
    "ForQuestionAnswering": ("start_logits", "end_logits", "loss"),
}
NAMES = [(f, h) for f in FAMILIES for h in HEADS if hasattr(transformers, f"{f}{h}")]
CASES = [("none", F32), ("right", F32), ("left", F32), ("right", BF16), ("left", F16)]


def labels_for(head: str, ids, mask) -> dict:
    real = torch.ones(ids.shape, dtype=torch.bool) if mask is None else mask.bool()
    if head == "ForSequenceClassification":
        return {"labels": torch.randint(0, 4, (len(ids),))}
    if head == "ForCausalLM":
        labels = torch.randint(0, VOCABULARY, ids.shape).masked_fill(~real, -100)
        labels[:, 1:].masked_fill_(~real[:, :-1], -100)  # the previous position is padding
        return {"labels": labels}
    if head == "ForTokenClassification":
        return {"labels": torch.randint(0, 4, ids.shape).masked_fill(~real, -100)}
    return {}


def real_rows(t, mask):
    return t[mask.bool()] if mask is not None and t.dim() >= 2 and t.shape[:2] == mask.shape else t


def compare(ours, theirs, truth, mask, names):
    for name in names:
        if name not in theirs:
            continue
        parts = [real_rows(output[name], mask) for output in (ours, truth, theirs)]
        if name == "loss":  # the error of a single number is random: compare it together with the logits
            parts = [torch.cat((p.view(-1), real_rows(o[names[0]], mask).flatten()))
                     for p, o in zip(parts, (ours, truth, theirs))]  # fmt: skip
        assert_as_accurate(*parts, OUTPUT, name)


@pytest.mark.quick
@pytest.mark.parametrize("family", ["Mistral", "Gemma2", "GPTNeo"])
def test_windows_over_padding_among_the_tokens(family):
    """Distances in windows include the padding between two tokens."""
    models = decoder_cases.models(family, "Model")
    ids, _ = decoder_cases.batch("none")
    mask = ((torch.rand(ids.shape) < 0.6) | (torch.arange(ids.shape[1]) == 0)).long()
    with torch.no_grad():
        compare(*(m(ids, attention_mask=mask) for m in models), mask, ("last_hidden_state",))


@pytest.mark.parametrize("padding, dtype", CASES)
@pytest.mark.parametrize("family, head", NAMES)
def test_outputs(family, head, padding, dtype):
    models = decoder_cases.models(family, head, dtype)
    collected = [{} for _ in models]
    for _ in range(16 if head in ("ForSequenceClassification", "ForQuestionAnswering") else 4):  # few scores
        ids, mask = decoder_cases.batch(padding)
        call = labels_for(head, ids, mask)
        with torch.no_grad():
            outputs = [m(ids, attention_mask=mask, **call) for m in models]
        assert list(outputs[0].keys()) == list(outputs[1].keys())
        for found, output in zip(collected, outputs):
            for key in HEADS[head]:
                if key in output:
                    group = "spans" if key.startswith(("start", "end")) else key
                    found.setdefault(group, []).append(real_rows(output[key], mask).flatten())
    names = ("spans",) if head == "ForQuestionAnswering" else HEADS[head]
    compare(*({k: torch.cat(v) for k, v in found.items()} for found in collected), None, names)


@pytest.mark.parametrize("padding, dtype", [("right", F32), ("left", BF16)])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients(family, padding, dtype):
    models = decoder_cases.models(family, "ForCausalLM", dtype)
    ids, mask = decoder_cases.batch(padding)
    call = labels_for("ForCausalLM", ids, mask)
    found = []
    for model in models:
        model.train()
        model(ids, attention_mask=mask, **call).loss.backward()
        found.append({name: p.grad.double() for name, p in model.named_parameters()})
    ours, theirs, truth = found
    assert ours.keys() == theirs.keys()
    assert_as_accurate(
        pooled(ours, truth).to(dtype), pooled(truth, truth), pooled(theirs, truth).to(dtype), GRADIENT, "gradients"
    )


@pytest.mark.parametrize("name", SWITCHES)
def test_configuration_switches(name):
    family, changes = SWITCHES[name]
    models = decoder_cases.models(family, "ForCausalLM", **changes)
    ids, mask = decoder_cases.batch("left")
    with torch.no_grad():
        outputs = [m(ids, attention_mask=mask, output_hidden_states=True) for m in models]
    assert len(outputs[0].hidden_states) == len(outputs[1].hidden_states)
    outputs = [{"logits": o.logits} | {f"state {i}": t for i, t in enumerate(o.hidden_states)} for o in outputs]
    compare(*outputs, mask, list(outputs[0]))
    ours, theirs, _ = models
    generated = [m.generate(ids, attention_mask=mask, max_new_tokens=14, do_sample=False) for m in (ours, theirs)]
    assert torch.equal(*generated)


METHODS = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled": {"do_sample": True, "top_k": 9},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "attentions": {"output_attentions": True, "return_dict_in_generate": True},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_generates_the_same_tokens(family, method):
    ours, theirs, _ = decoder_cases.models(family, "ForCausalLM")
    ids, mask = decoder_cases.batch("left")
    found = []
    for model in (ours, theirs):
        torch.manual_seed(5)
        options = {"do_sample": False} | METHODS[method]
        tokens = model.generate(ids, attention_mask=mask, max_new_tokens=13, disable_compile=True, **options)
        found.append(tokens if isinstance(tokens, torch.Tensor) else tokens.sequences)
    assert torch.equal(*found)


@pytest.mark.parametrize("family", FAMILIES)
def test_decodes_by_one_native_call(family):
    from transformer_fast.backends import native
    from transformer_fast.generation.native_step import NativeStepper
    from transformer_fast.generation.stepper import Prompt

    if native.load():
        pytest.skip(native.load())
    ours, _, _ = decoder_cases.models(family, "ForCausalLM")
    with torch.no_grad():
        assert NativeStepper.why_not(ours, Prompt(torch.ones(1, 3, dtype=torch.long))) == ""


@pytest.mark.parametrize(
    "name, reason",
    [
        ("positions of YaRN", ""), ("norms of heads", ""), ("no biases", ""), ("norms after the sublayers", ""),
        ("narrow words", "its embeddings are narrower than its layers"),
        ("positions that change with the length", "the angles of its rotary positions change with the length"),
        ("positions of LongRoPE", "the angles of its rotary positions change with the length"),
    ],
)  # fmt: skip
def test_what_the_native_call_serves(name, reason):
    from transformer_fast.generation.native_step import NativeStepper
    from transformer_fast.generation.stepper import Prompt

    family, changes = SWITCHES[name]
    ours, _, _ = decoder_cases.models(family, "ForCausalLM", **changes)
    with torch.no_grad():
        assert NativeStepper.why_not(ours, Prompt(torch.ones(1, 3, dtype=torch.long))) == reason


@pytest.mark.parametrize("name", ["positions that change with the length", "positions of LongRoPE"])
def test_a_long_row_that_ends_changes_the_angles_of_the_others(name):
    """As in Hugging Face's loop, the length includes rows that have ended; later calls use the fast path."""
    family, changes = SWITCHES[name]
    ours, theirs, _ = decoder_cases.models(family, "ForCausalLM", **changes)
    ids, mask = decoder_cases.batch("left")
    ids, mask = ids[:2], mask[:2]
    call = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    whole = [
        m.generate(ids, **call, eos_token_id=None) for m in (ours, theirs)
    ]  # each model keeps the angles of its last call
    end = int(whole[1][0, ids.shape[1] + 5])
    found = [m.generate(ids, **call, eos_token_id=end) for m in (ours, theirs)]
    assert torch.equal(*whole) and torch.equal(*found) and not torch.equal(found[1], whole[1])
    assert "change with the length" in ours.why_hf_loop()
    assert "the fast path" in transformer_fast.explain(ours)


@pytest.mark.parametrize("family", FAMILIES)
def test_goes_on_from_a_cache(family):
    """A prompt in two pieces, then token by token, over windows that drop keys; padding on the left."""
    models = decoder_cases.models(family, "ForCausalLM")
    ids, mask = decoder_cases.batch("left")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    outputs = []
    for model in models:
        cache, logits = None, []
        for begin, end in ((0, 7), (7, 9), (9, 10), (10, 11), (11, 13)):
            with torch.no_grad():
                places = None if family == "OPT" else positions[:, begin:end]  # OPT counts positions from the mask
                output = model(
                    ids[:, begin:end], attention_mask=mask[:, :end], position_ids=places, past_key_values=cache,
                    use_cache=True,
                )  # fmt: skip
            cache = output.past_key_values
            logits.append(output.logits)
        outputs.append({"logits": torch.cat(logits, 1)})
    compare(*outputs, mask, ("logits",))


@pytest.mark.parametrize("family", FAMILIES)
def test_attentions(family):
    models = decoder_cases.models(family, "Model")
    ids, mask = decoder_cases.batch("right")
    with torch.no_grad():
        outputs = [m(ids, attention_mask=mask, output_attentions=True) for m in models]
    ours, theirs, truth = (torch.stack(o.attentions, 1).flatten(1, 2).transpose(1, 2) for o in outputs)
    assert_as_accurate(*(t[mask.bool()] for t in (ours, truth, theirs)), OUTPUT, "attentions")


@pytest.mark.parametrize("family", FAMILIES)
def test_documents_in_one_row(family):
    """A new document begins where position_ids restart; documents do not attend to one another."""
    models = decoder_cases.models(family, "ForCausalLM")
    ids = torch.randint(3, VOCABULARY, (1, 12))
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 4]])
    with torch.no_grad():
        whole = [m(ids, position_ids=positions, use_cache=False) for m in models]
        alone = models[0](ids[:, 7:])
    compare(*whole, None, ("logits",))
    if family != "OPT":  # its masks ignore position_ids
        torch.testing.assert_close(whole[0].logits[:, 7:], alone.logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoints_both_ways(family, tmp_path):
    name = f"{family}ForCausalLM"
    ours, theirs, _ = decoder_cases.models(family, "ForCausalLM")
    for source, reader in ((theirs, transformer_fast), (ours, transformers)):
        folder = tmp_path / reader.__name__
        source.save_pretrained(folder)
        read = getattr(reader, name).from_pretrained(folder)
        wanted = source.state_dict()
        assert read.state_dict().keys() == wanted.keys()
        assert all(torch.equal(t, wanted[key]) for key, t in read.state_dict().items())
    assert type(transformer_fast.AutoModelForCausalLM.from_pretrained(folder)) is getattr(transformer_fast, name)


def test_bad_input():
    ours, _, _ = decoder_cases.models("Llama", "ForCausalLM")
    ids = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="input_ids, inputs_embeds: wanted exactly one"):
        ours()
    with pytest.raises(ValueError, match=rf"input_ids: wanted values in \[0, {VOCABULARY}\)"):
        ours(ids * VOCABULARY)
    with pytest.raises(ValueError, match=r"position_ids: wanted shape \(2, 3\)"):
        ours(ids, position_ids=torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="input_ids: 49 positions exceed config.max_position_embeddings = 48"):
        decoder_cases.models("GPTNeo", "Model")[0](torch.ones(1, 49, dtype=torch.long))
    ours, _, _ = decoder_cases.models("OPT", "ForSequenceClassification")
    with pytest.raises(ValueError, match=r"position_ids: wanted values in \[0, 50\)"):
        ours(torch.ones(1, 49, dtype=torch.long))
    with pytest.raises(ValueError, match="position_ids: wanted with an attention_mask of 4 dimensions"):
        ours(ids, attention_mask=torch.ones(2, 1, 3, 3, dtype=torch.bool))


@pytest.mark.quick
def test_segments_are_embedded_as_words():
    models = decoder_cases.models("GPTNeo", "ForCausalLM")
    ids, mask = decoder_cases.batch("right")
    types = torch.randint(0, 3, ids.shape)
    with torch.no_grad():
        compare(*(m(ids, attention_mask=mask, token_type_ids=types) for m in models), mask, ("logits",))
        unused = decoder_cases.models("GPTNeoX", "ForQuestionAnswering")
        compare(*(m(ids, attention_mask=mask, token_type_ids=types) for m in unused), mask, ("start_logits",))


@pytest.mark.quick
def test_embeddings_in_place_of_narrow_words():
    models = decoder_cases.models("OPT", "ForSequenceClassification", word_embed_proj_dim=16)
    embeddings, mask = torch.randn(6, 5, 16), (torch.arange(5) < torch.tensor([5, 4, 1, 2, 3, 5])[:, None]).long()
    with torch.no_grad():
        outputs = [m.model(inputs_embeds=embeddings.to(m.dtype), attention_mask=mask) for m in models]
    compare(*outputs, mask, ("last_hidden_state",))
    with pytest.raises(ValueError, match=r"inputs_embeds: wanted \(batch, length, 16\)"):
        models[0](inputs_embeds=torch.randn(2, 3, 32), attention_mask=torch.ones(2, 3))


def test_layers_that_are_dropped_in_training(monkeypatch):
    models = decoder_cases.models("OPT", "Model", layerdrop=0.5)[:2]
    draws = []
    for model in models:
        kept = iter((0.9, 0.1, 0.7))
        monkeypatch.setattr(torch, "rand", lambda *size, kept=kept: torch.tensor(next(kept)))
        draws.append(model.train()(torch.arange(3, 9)[None]).last_hidden_state)
    torch.testing.assert_close(*draws)
