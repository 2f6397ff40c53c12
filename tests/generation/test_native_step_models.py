"""generate() with the native step returns the tokens of the model's own forward, for all prompts and methods."""

import copy
import os

import pytest
import torch
from generating_models import METHODS, SEQ2SEQ, models, prompts, seq2seq_models
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_as_accurate

from transformer_fast.backends import memory, native
from transformer_fast.backends.contents import mirror_files
from transformer_fast.generation import set_weight_storage
from transformer_fast.generation.native_step import NativeStepper
from transformer_fast.generation.weights import kept_copies

if native.load():
    pytest.skip(native.load(), allow_module_level=True)


@pytest.fixture
def served(monkeypatch):
    """The native steppers that were started."""
    count = []
    start = NativeStepper.start
    monkeypatch.setattr(NativeStepper, "start", lambda self: (count.append(1), start(self))[1])
    return count


# So that no weight is smaller than a page of memory.
WIDER = {"d_model": 64, "d_kv": 16, "d_ff": 64, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}


@pytest.mark.parametrize("method", METHODS)
def test_same_tokens_as_hugging_face(served, method):
    @settings(max_examples=4, deadline=None, derandomize=True)
    @given(seed=st.integers(0, 50), batch=st.integers(1, 4), length=st.integers(1, 9),
           inverse=st.booleans(), side=st.sampled_from(["left", "right"]), copy=st.booleans())  # fmt: skip
    def property(seed, batch, length, inverse, side, copy):
        theirs, ours = models(seed, scale_attn_by_inverse_layer_idx=inverse)
        set_weight_storage(ours, copy=copy)
        ids, mask = prompts(batch, length, side)
        kwargs = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, **METHODS[method]}
        found = []
        for model in (theirs, ours):
            torch.manual_seed(seed)
            found.append(model.generate(ids, **kwargs))
        assert torch.equal(*found)

    property()
    assert len(served) >= 4


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("family", SEQ2SEQ)
def test_encoder_decoders_as_hugging_face(served, family, beams):
    seen: set[int] = set()
    for seed in range(3):
        theirs, ours = seq2seq_models(family, seed)
        set_weight_storage(ours, copy=bool(seed % 2))
        ids, mask = prompts(3, 9, "right")
        kwargs = {"attention_mask": mask, "max_new_tokens": 14, "num_beams": beams, "do_sample": False}
        found = [model.generate(ids, **kwargs) for model in (theirs, ours)]
        assert torch.equal(*found)
        seen |= set(found[0].flatten().tolist())
    assert len(served) == 3 and len(seen) > 6


@pytest.mark.quick
@pytest.mark.parametrize("copied", [True, False])
def test_scores_and_cache_of_a_generation(served, copied):
    theirs, ours = models()
    set_weight_storage(ours, copy=copied)
    ids, mask = prompts(3, 7, "left")
    kwargs = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False, "return_dict_in_generate": True}
    wide = copy.deepcopy(theirs).double()
    theirs = theirs.generate(ids, output_logits=True, **kwargs)
    found = ours.generate(ids, output_logits=True, **kwargs)
    assert torch.equal(found.sequences, theirs.sequences)
    assert len(found.logits) == len(theirs.logits)
    assert len({id(x) for x in found.logits}) == len(found.logits)
    read = torch.nn.functional.pad(mask, (0, 8), value=1)  # the model has not read the last token
    with torch.no_grad():
        truth = wide(found.sequences[:, :-1], attention_mask=read, position_ids=(read.cumsum(1) - 1).clamp(min=0))
    assert_as_accurate(torch.stack(found.logits, 1), truth.logits[:, 6:], torch.stack(theirs.logits, 1))
    keys = [g.past_key_values.layers[1].keys for g in (found, truth, theirs)]
    assert keys[0].shape == keys[1].shape == keys[2].shape
    seen = torch.nn.functional.pad(mask.bool(), (0, keys[0].shape[2] - 7), value=True)
    assert_as_accurate(*(k.transpose(1, 2)[seen] for k in keys))
    assert served


def test_bfloat16_models_and_storage(served):
    """In half precision the tokens are those of the model's own forward, unless the two best tokens are close."""
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


@pytest.mark.skipif(not os.access("/proc/self/pagemap", os.R_OK), reason="the system has no /proc/self/pagemap")
@pytest.mark.parametrize("family", ["gpt2", *SEQ2SEQ])
def test_a_copy_takes_the_place_of_a_mapped_checkpoint(served, family, tmp_path, monkeypatch):
    """This happens by default if it costs no memory: the weights release their memory and keep their values."""
    theirs, built = models(n_embd=64) if family == "gpt2" else seq2seq_models(family, 0, **WIDER)
    theirs.save_pretrained(tmp_path)
    ours = type(built).from_pretrained(tmp_path).eval()
    ids, mask = prompts(3, 9, "right" if family in SEQ2SEQ else "left")
    kwargs = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    wanted = theirs.generate(ids, **kwargs)
    given_back = []
    unload = memory.unload
    monkeypatch.setattr(memory, "unload", lambda t, files: (given_back.append(t.data_ptr()), unload(t, files)))
    for model in (ours, built):
        assert torch.equal(model.generate(ids, **kwargs), wanted)
    assert len(served) == 2 and kept_copies(built) is None  # weights in ordinary memory are read in place
    copies = kept_copies(ours)
    copied = ours.step_description().tensors().weights()
    assert copied and {w.data_ptr() for w in copied} <= set(given_back)
    assert mirror_files(copied)
    for (name, a), b in zip(ours.state_dict().items(), built.state_dict().values()):
        assert torch.equal(a, b), name
    copied[0].mul_(1)
    assert torch.equal(ours.generate(ids, **kwargs), wanted) and kept_copies(ours) is copies
    copied[0].mul_(2)  # no longer equal to the checkpoint
    ours.generate(ids, **kwargs)
    assert kept_copies(ours) is None
    copied[0].div_(2)
    assert torch.equal(ours.generate(ids, **kwargs), wanted)
    set_weight_storage(ours, torch.bfloat16)
    ours.generate(ids, **kwargs)
    assert kept_copies(ours).storage == torch.bfloat16
    set_weight_storage(ours)
    assert torch.equal(ours.generate(ids, **kwargs), wanted) and kept_copies(ours) is None


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
    """An optimizer step has an effect on the next generation."""
    theirs, ours = models(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    ids, mask = prompts(2, 5, "right")
    ours.generate(ids, attention_mask=mask, max_new_tokens=3)
    for model in (theirs, ours):
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        optimizer.step()
        model.eval()
    kwargs = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(ours.generate(ids, **kwargs), theirs.generate(ids, **kwargs))
