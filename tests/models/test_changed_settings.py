"""Settings that are changed after construction have the effect that they have in Hugging Face's model."""

import copy

import pytest
import torch
from compat_families import make_inputs, make_pair
from hf_models import truth
from numerics import GRADIENT, assert_as_accurate
from torch import nn

import transformer_fast
from transformer_fast.models._stock import BUILT, why_hf_forward, why_hf_loop


def _other(value):
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, str):
        return "silu" if value == "relu" else "relu"
    return value[::-1] if isinstance(value, list) else value * 2


def _configs(model):
    return {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()


def _logits(model, call):
    with torch.no_grad():
        output = model(**call)
    return output.logits if "logits" in output else output.last_hidden_state


@pytest.mark.parametrize("name", [
    "AlbertForMaskedLM", "BartForConditionalGeneration", "BertModel", "DebertaV2ForMaskedLM", "DistilBertForMaskedLM",
    "GPT2LMHeadModel", "GPTNeoForCausalLM", "GPTNeoXForCausalLM", "Gemma2ForCausalLM", "LlamaForCausalLM",
    "MPNetForMaskedLM", "ModernBertForSequenceClassification", "OPTForCausalLM", "OpenAIGPTLMHeadModel",
    "T5ForConditionalGeneration",
])  # fmt: skip
def test_a_configuration_changed_for_another_model(name):
    ours, theirs = make_pair(name)
    call = {k: v[:3] for k, v in make_inputs(name).items() if "input_ids" in k}
    exact = truth(theirs)
    assert not why_hf_forward(ours)
    built = [m for m in ours.modules() if m.__dict__.get(BUILT)]
    for model in (ours, theirs, exact):
        for config in _configs(model):
            for field in {f for m in built for f in m.__dict__[BUILT]} & config.__dict__.keys():
                config.__dict__[field] = _other(config.__dict__[field])
    assert_as_accurate(_logits(ours, call), _logits(exact, call), _logits(theirs, call))
    assert "when the model was built" in why_hf_forward(built[-1])
    assert "when the model was built" in ours.explain()
    if hasattr(ours, "why_hf_loop"):
        assert "when the model was built" in why_hf_loop(ours)


def test_a_configuration_changed_after_accelerate():
    _, theirs = make_pair("BertForMaskedLM")
    call = {k: v[:3] for k, v in make_inputs("BertForMaskedLM").items() if k == "input_ids"}
    exact, ours = truth(theirs), copy.deepcopy(theirs)
    report = transformer_fast.accelerate(ours, verbose=False)
    assert not why_hf_forward(ours)
    ours.config.hidden_act = "relu"
    assert_as_accurate(_logits(ours, call), _logits(exact, call), _logits(theirs, call))
    report.undo()
    assert not any(BUILT in m.__dict__ for m in ours.modules())


def _scores(model, ids):
    """(tokens, scores) of greedy decoding."""
    found = model.generate(
        ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    return found.sequences, torch.stack(found.logits, 1)


def _scores_in_one_row(model, ids, tokens):
    """The logits of `tokens`, of a decoder that reads them in one forward."""
    call = {"input_ids": ids, "decoder_input_ids": tokens} if model.config.is_encoder_decoder else {"input_ids": tokens}
    return _logits(model, call | {"use_cache": False})[:, -5:-1]


@pytest.mark.parametrize("name", ["BartForConditionalGeneration", "MarianMTModel", "LlamaForCausalLM"])
def test_heads_with_a_bias_of_their_own(name):
    ours, theirs = make_pair(name)
    bias = torch.randn(61)
    for model in (ours, theirs):
        model.lm_head.bias = nn.Parameter(bias.clone())
    ids = torch.randint(3, 61, (3, 5))
    assert not why_hf_loop(ours)
    tokens, scores = _scores(ours, ids)
    assert_as_accurate(
        scores, _scores_in_one_row(truth(theirs), ids, tokens), _scores_in_one_row(theirs, ids, tokens)
    )  # fmt: skip


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM", "MarianMTModel", "BertForMaskedLM"])
def test_embeddings_that_limit_their_norm(name):
    """max_norm writes to the looked-up rows, which a tied head reads too: also to those of padding."""
    ours, theirs = make_pair(name)
    exact = truth(theirs)
    for model in (ours, theirs, exact):
        model.get_input_embeddings().max_norm = 0.7
    call = {k: v[:3] for k, v in make_inputs(name).items() if k != "labels"}
    mask = call["attention_mask"].bool() if "decoder_input_ids" not in call else ...
    assert_as_accurate(*(_logits(m, call)[mask] for m in (ours, exact, theirs)))
    assert "max_norm is 0.7" in why_hf_forward(ours)
    if hasattr(ours, "why_hf_loop"):
        assert "max_norm is 0.7" in why_hf_loop(ours)


def test_norms_of_gemma_in_float32():
    """A bfloat16 model whose norms are in float32, as for training in few bits, computes the rest in bfloat16."""
    ours, theirs = make_pair("Gemma2ForCausalLM")
    exact = truth(theirs)
    for model in (ours, theirs):
        model.to(torch.bfloat16)
        for module in model.modules():
            if type(module).__name__ == "Gemma2RMSNorm":
                module.float()
    call = {"input_ids": torch.randint(3, 61, (3, 6))}
    assert not why_hf_forward(ours)
    exact.load_state_dict(theirs.state_dict())
    found = _logits(ours, call)
    assert found.dtype == torch.bfloat16
    assert_as_accurate(found, _logits(exact, call), _logits(theirs, call))


@pytest.mark.parametrize("name", ["BertForQuestionAnswering", "GPT2ForQuestionAnswering", "LlamaForQuestionAnswering"])
def test_a_replaced_head_that_scores_padding(name):
    """Hugging Face's forward of the head runs on our base, and its loss has a softmax over all positions."""
    ours, theirs = make_pair(name)
    exact, call = truth(theirs), make_inputs(name)
    for model in (ours, theirs, exact):
        model.qa_outputs = nn.Sequential(model.qa_outputs)
    assert "qa_outputs" in why_hf_forward(ours)
    assert not why_hf_forward(ours.base_model)
    with torch.no_grad():
        found = [m(**call)[1] for m in (ours, exact, theirs)]  # the scores, also of padding
    assert_as_accurate(*found)
    short = ours(**{k: v for k, v in call.items() if "positions" not in k}, output_hidden_states=True)
    assert not short.hidden_states[-1][call["attention_mask"] == 0].any()  # read by nothing: still dropped


@pytest.mark.parametrize("how", ["labels on padding", "padding first"])
def test_a_replaced_head_that_reads_padding(how):
    name = "BertForTokenClassification" if how == "labels on padding" else "DebertaV2ForSequenceClassification"
    ours, theirs = make_pair(name)
    exact, call = truth(theirs), make_inputs(name)
    if how == "labels on padding":
        call["labels"] = call["labels"].clamp(min=1)
    else:
        call["attention_mask"] = call["attention_mask"].flip(1)
    for model in (ours, theirs, exact):
        model.classifier = nn.Sequential(model.classifier)
    with torch.no_grad():
        found = [m(**call)[1] for m in (ours, exact, theirs)]  # the scores, also of padding
    assert_as_accurate(*found)


def _their_own_loss(*tensors, **named):
    return torch.tensor(42.0)


@pytest.mark.parametrize("name", ["GPTNeoXForSequenceClassification", "LlamaForQuestionAnswering", "OPTForCausalLM",
                                  "Qwen2ForTokenClassification", "PhiForSequenceClassification"])  # fmt: skip
def test_a_loss_function_of_the_user(name):
    ours, theirs = make_pair(name)
    call = make_inputs(name)
    for model in (ours, theirs):
        assert model(**call).loss != 42.0
        model.loss_function = _their_own_loss
        assert model(**call).loss == 42.0


def test_the_loss_per_item_of_question_answering():
    ours, theirs = make_pair("LlamaForQuestionAnswering")
    call = make_inputs("LlamaForQuestionAnswering") | {"num_items_in_batch": 5}
    torch.testing.assert_close(*(m(**call).loss.detach() for m in (ours, theirs)))


@pytest.mark.parametrize("name", ["BartForConditionalGeneration", "T5ForConditionalGeneration", "BertForMaskedLM",
                                  "LlamaForTokenClassification"])  # fmt: skip
@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
def test_dtypes_of_losses(name, how):
    """A loss in 16 bits has 8 significant bits: too few to see progress."""
    call, found = make_inputs(name), []
    for model in make_pair(name):
        if how == "bfloat16":
            model.bfloat16()
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
            output = model(**call)
        found.append((output.loss.dtype, output.logits.dtype))
    assert found[0] == found[1]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_per_example():
    ours, theirs = make_pair("BertForMaskedLM")
    exact, call = truth(theirs), make_inputs("BertForMaskedLM")
    name, gradients = "bert.embeddings.word_embeddings.weight", []
    for model in (ours, exact, theirs):
        others = {k: v.detach() for k, v in model.named_parameters() if k != name and "decoder.weight" not in k}

        def loss(words, ids, labels, model=model, others=others):
            whole = others | {name: words, "cls.predictions.decoder.weight": words}
            one = {"input_ids": ids[None], "labels": labels[None]}
            return torch.func.functional_call(model, whole, (), one, tie_weights=False).loss

        per_example = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
        words = model.get_parameter(name).detach()
        gradients.append(per_example(words, call["input_ids"][:3], call["labels"][:3]))
    assert_as_accurate(*gradients, GRADIENT)
