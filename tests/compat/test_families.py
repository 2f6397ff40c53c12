"""Every class: load, forward, backward and outputs equal those of the installed release of transformers."""

import pytest
import torch
import transformers
from compat_families import CLASSES, make_inputs, make_pair, real_parts
from hf_models import truth
from numerics import GRADIENT, OUTPUT, assert_as_accurate, pooled

import transformer_fast
from transformer_fast._transformers import CACHE_NAME

WINDOWED = ("modernbert", "mistral", "qwen2")


@pytest.mark.parametrize("name", CLASSES)
def test_forward_and_backward(name):
    ours, theirs = make_pair(name)
    exact = truth(theirs)  # HF's eager attention in float64 makes NaN where a window holds nothing but padding
    # In such rows SDPA gives zeros, and HF's eager attention the mean of all values; a loss over spans reads them.
    theirs.set_attn_implementation("sdpa" if CLASSES[name] in WINDOWED else "eager")
    if CLASSES[name] in WINDOWED:
        exact.set_attn_implementation("sdpa")
    call = make_inputs(name)
    outputs, gradients, keys = [], [], []
    for model in (ours, theirs, exact):
        model.train()  # dropout is 0
        output = model(**call, output_hidden_states=True)  # a head alone has too few elements to compare
        loss = output.get("loss")
        parts = real_parts(output, call)
        if loss is None:
            generator = torch.Generator().manual_seed(5)
            states = parts["last_hidden_state"]
            loss = (states * torch.randn(states.shape, generator=generator).to(states)).sum()
        loss.backward()
        outputs.append(parts)
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        keys.append([key for key in output if key != CACHE_NAME])  # in training ours makes a cache only on request
    assert keys[0] == keys[1]
    assert [g.keys() for g in gradients] == [gradients[2].keys()] * 3
    for found, factor, kind in ((outputs, OUTPUT, "outputs"), (gradients, GRADIENT, "gradients")):
        flat = [pooled(tensors, found[2]) for tensors in found]
        assert_as_accurate(flat[0].float(), flat[2], flat[1].float(), factor, kind)


@pytest.mark.parametrize("name", CLASSES)
def test_outputs_have_this_release_s_names(name):
    ours, theirs = make_pair(name)
    call = make_inputs(name)
    call = {k: v for k, v in call.items() if "label" not in k and not k.endswith("_positions")}
    with torch.no_grad():
        for options in ({}, {"output_hidden_states": True, "output_attentions": True}):
            if "output_attentions" in options:
                theirs.set_attn_implementation("eager")
            seen, wanted = ours(**call, **options), theirs(**call, **options)
            assert list(seen.keys()) == list(wanted.keys())
            assert len(ours(**call, **options, return_dict=False)) == len(wanted.to_tuple())
            for key, value in wanted.items():
                assert type(value) is type(seen[key]), key


@pytest.mark.parametrize("name", ["BertForMaskedLM", "AlbertModel", "DistilBertModel", "CamembertModel",
                                  "DebertaV2ForMaskedLM",
                                  "ElectraForPreTraining", "MPNetForMaskedLM", "ModernBertForMaskedLM",
                                  "GPT2LMHeadModel", "OpenAIGPTLMHeadModel", "GPTNeoForCausalLM", "Gemma2ForCausalLM",
                                  "MistralForCausalLM", "Qwen3ForCausalLM", "BartForConditionalGeneration",
                                  "MarianMTModel", "MBartForConditionalGeneration", "M2M100ForConditionalGeneration",
                                  "PegasusForConditionalGeneration", "UMT5ForConditionalGeneration",
                                 
                                  "T5ForConditionalGeneration"])  # fmt: skip
def test_checkpoints_go_both_ways(name, tmp_path):
    ours, theirs = make_pair(name)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    loaded, info = getattr(transformer_fast, name).from_pretrained(tmp_path / "theirs", output_loading_info=True)
    back, back_info = getattr(transformers, name).from_pretrained(tmp_path / "ours", output_loading_info=True)
    for found in (info, back_info):
        assert not found["missing_keys"] and not found["unexpected_keys"]
    wanted = theirs.state_dict()
    for model in (loaded, back):
        state = model.state_dict()
        assert state.keys() == wanted.keys()
        assert all(torch.equal(state[k], wanted[k]) for k in wanted)
