"""generate() by the native step: the tokens of the model's own forward, whatever the prompts and the method."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config
from transformers.models.gpt2 import modeling_gpt2 as hf

import transformer_fast as tf
from transformer_fast.backends import native
from transformer_fast.generation import native_step, set_weight_storage
from transformer_fast.generation.native_step import NativeStepper

if native.load():
    pytest.skip(native.load(), allow_module_level=True)

VOCABULARY = 53


@pytest.fixture
def served(monkeypatch):
    """The number of native steppers that were started."""
    count = []
    start = NativeStepper.start
    monkeypatch.setattr(NativeStepper, "start", lambda self: (count.append(1), start(self))[1])
    return count


def models(seed=0, **options):
    """HF's GPT-2 and ours with the same weights, large enough for decided next tokens."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.4,
        bos_token_id=0, eos_token_id=1, pad_token_id=2, **options,
    )  # fmt: skip
    theirs, ours = hf.GPT2LMHeadModel(config).eval(), tf.GPT2LMHeadModel(config).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def prompts(batch, length, side):
    ids = torch.randint(3, VOCABULARY, (batch, length))
    lengths = torch.randint(1, length + 1, (batch,))
    lengths[0] = length
    kept = torch.arange(length) < lengths[:, None]
    mask = (kept.flip(1) if side == "left" else kept).long()
    return ids.masked_fill(mask == 0, 2), mask


METHODS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "n-best": {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.4, "early_stopping": True},
    "penalties": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "min_new_tokens": 4},
    "sampled": {"do_sample": True, "top_k": 9, "num_return_sequences": 3},
}


@pytest.mark.parametrize("method", METHODS)
def test_same_tokens_as_hugging_face(served, method):
    @settings(max_examples=6, deadline=None, derandomize=True)
    @given(seed=st.integers(0, 50), batch=st.integers(1, 4), length=st.integers(1, 9),
           inverse=st.booleans(), side=st.sampled_from(["left", "right"]))  # fmt: skip
    def property(seed, batch, length, inverse, side):
        theirs, ours = models(seed, scale_attn_by_inverse_layer_idx=inverse)
        ids, mask = prompts(batch, length, side)
        kwargs = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, **METHODS[method]}
        found = []
        for model in (theirs, ours):
            torch.manual_seed(seed)
            found.append(model.generate(ids, **kwargs))
        assert torch.equal(*found)

    property()
    assert len(served) >= 6


@pytest.mark.quick
def test_scores_and_cache_of_a_generation(served):
    theirs, ours = models()
    ids, mask = prompts(3, 7, "left")
    kwargs = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False, "return_dict_in_generate": True}
    theirs = theirs.generate(ids, output_logits=True, **kwargs)
    found = ours.generate(ids, output_logits=True, **kwargs)
    assert torch.equal(found.sequences, theirs.sequences) and len(found.logits) == len(theirs.logits)
    assert len({id(x) for x in found.logits}) == len(found.logits)
    for a, b in zip(found.logits, theirs.logits):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))
    keys, seen = found.past_key_values.layers[1].keys, mask[:, None, :, None].bool()
    wanted = theirs.past_key_values.layers[1].keys
    assert keys.shape == wanted.shape
    assert torch.allclose(keys[:, :, :7] * seen, wanted[:, :, :7] * seen, rtol=1e-3, atol=1e-3)
    assert torch.allclose(keys[:, :, 7:], wanted[:, :, 7:], rtol=1e-3, atol=1e-3)
    assert served


def test_bfloat16_models_and_storage(served):
    """Half precision decides as the model's own forward does wherever the two best tokens are not close."""
    _, ours = models()
    ids, mask = prompts(4, 6, "left")
    kwargs = {"attention_mask": mask, "max_new_tokens": 1, "do_sample": False}
    truth = ours(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, -1]
    best = truth.topk(2)[0]
    decided = best[:, 0] - best[:, 1] > 0.1 * truth.abs().amax(1)
    set_weight_storage(ours, torch.bfloat16)
    stored = ours.generate(ids, **kwargs)[:, -1]
    assert torch.equal(stored[decided], truth.argmax(1)[decided])
    ours.bfloat16()
    half = ours.generate(ids, **kwargs)[:, -1]
    assert torch.equal(half[decided], truth.argmax(1)[decided])
    assert decided.any() and len(served) == 2


def test_what_the_native_step_leaves_to_the_model(served):
    theirs, ours = models()
    ids, mask = prompts(2, 5, "left")
    kwargs = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    wanted = theirs.generate(ids, **kwargs)
    seen = []
    hook = ours.transformer.h[1].mlp.c_fc.register_forward_hook(lambda *a: seen.append(1))
    assert torch.equal(ours.generate(ids, **kwargs), wanted) and len(seen) == 6 and not served
    hook.remove()
    assert torch.equal(ours.generate(ids, **kwargs), wanted) and served
    count = len(served)
    ours.double()
    assert torch.equal(ours.generate(ids, **kwargs), wanted) and len(served) == count


def test_training_between_generations(served):
    """An optimizer's step changes what the next generation sees."""
    theirs, ours = models(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    ids, mask = prompts(2, 5, "right")
    ours.generate(ids, attention_mask=mask, max_new_tokens=3)
    first = native_step._packed[ours]
    for model in (theirs, ours):
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        optimizer.step()
        model.eval()
    kwargs = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(ours.generate(ids, **kwargs), theirs.generate(ids, **kwargs))
    assert native_step._packed[ours] is not first
