"""Positions that attend to no key. In transformers' sdpa attention they get zeros; in its eager attention, and in T5's
sdpa, the mean of all values. Ours does the same: where it is the mean, transformers' own forward runs."""

import copy

import pytest
import torch
from compat_families import VOCABULARY, make_pair
from hf_models import exact_norms, truth
from numerics import GRADIENT, assert_as_accurate

import transformer_fast

IDS = torch.randint(3, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(0))
RIGHT = torch.tensor([[1] * 7, [0] * 7, [1] * 5 + [0] * 2])
LEFT = RIGHT.flip(1)
JOINED = ("T5ForConditionalGeneration", "BartForConditionalGeneration")
WRITTEN = ("MPNetModel", "OpenAIGPTLMHeadModel")  # transformers has attention written into these models
EAGER = ("BertModel", "GPT2LMHeadModel", "MistralForCausalLM", *JOINED, *WRITTEN)
SDPA = ("BertModel", "GPT2LMHeadModel", "MistralForCausalLM", *JOINED)


def _exact(name: str, attention: str, theirs):
    if name in WRITTEN or (attention == "sdpa" and "T5" not in name):
        return copy.deepcopy(theirs).double()
    return truth(theirs)  # with the mean


def _call(name: str, **call):
    if name in JOINED:
        call["decoder_input_ids"] = IDS[:, :5]
    return lambda model: model(IDS, **call)


@pytest.mark.parametrize("mask", [RIGHT, LEFT], ids=["right", "left"])
@pytest.mark.parametrize("name, attention", [(name, "eager") for name in EAGER] + [(name, "sdpa") for name in SDPA])
def test_every_position_is_as_in_transformers_where_padding_is_computed(name, attention, mask):
    ours, theirs = make_pair(name, attn_implementation=attention)
    call = _call(name, attention_mask=mask)
    with torch.no_grad():
        with transformer_fast.compute_padding(True):
            found = call(ours)[0]
        assert_as_accurate(found, call(_exact(name, attention, theirs))[0], call(theirs)[0])


@pytest.mark.parametrize("name, attention", [(JOINED[0], "sdpa"), (JOINED[0], "eager"), (JOINED[1], "eager")])
@pytest.mark.parametrize("hooked", [False, True])
def test_decoders_of_empty_texts(name, attention, hooked):
    """Cross-attention reads the states of the empty row. hooked: transformers' forward runs anyway."""
    ours, theirs = make_pair(name, attn_implementation=attention)
    if hooked:
        ours.get_encoder().register_forward_hook(lambda *_: None)
        next(ours.get_decoder().children()).register_forward_hook(lambda *_: None)
    call = _call(name, attention_mask=RIGHT)
    with torch.no_grad():
        assert_as_accurate(call(ours).logits, call(_exact(name, attention, theirs)).logits, call(theirs).logits)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "ModernBertForQuestionAnswering"])
def test_losses_that_include_such_positions(name):
    """ModernBert: padding beyond the window."""
    ours, theirs = make_pair(name, attn_implementation="eager")
    ids = IDS.repeat(1, 3)
    mask = (torch.arange(21) < torch.tensor([21, 3, 0 if name[:4] == "Bert" else 9])[:, None]).long()
    told = {"labels": ids} if "Masked" in name else {"start_positions": mask[:, 0], "end_positions": mask[:, 0]}
    models = {"ours": ours, "theirs": theirs, "truth": truth(theirs)}
    found = {}
    for key, model in models.items():
        loss = model(ids, attention_mask=mask, **told).loss
        loss.backward()
        found[key] = loss.detach(), model.get_input_embeddings().weight.grad
    losses, gradients = zip(*(found[key] for key in ("ours", "truth", "theirs")))
    assert_as_accurate(*losses)
    assert_as_accurate(*gradients, GRADIENT)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    """The layers run again in the backward pass, with the same attention."""
    ours, theirs = make_pair("T5ForConditionalGeneration", attn_implementation="sdpa")
    gradients = []
    for model in (ours, exact_norms(copy.deepcopy(theirs).double()), theirs):
        model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(IDS, attention_mask=RIGHT, labels=IDS[:, :5].contiguous()).loss.backward()
        gradients.append(model.shared.weight.grad)
    assert_as_accurate(*gradients, GRADIENT)


@pytest.mark.parametrize("name", [*JOINED, "OpenAIGPTLMHeadModel"])
def test_empty_prompts_continue_as_in_transformers(name):
    ours, theirs = make_pair(name, attn_implementation="eager")
    call = {"attention_mask": LEFT, "max_new_tokens": 4, "do_sample": False, "eos_token_id": -1}
    for options in ({}, {"num_beams": 2}):
        assert torch.equal(*(model.generate(IDS, **call, **options) for model in (ours, theirs)))


def test_other_batches_stay_on_the_fast_path():
    ours, _ = make_pair("BertModel", attn_implementation="eager")
    hidden = ours(IDS[2:], attention_mask=LEFT[2:]).last_hidden_state[0]
    assert not hidden[1].any() and hidden[2].any()  # the first position is pooled
