"""The attention interface, accelerate, Auto classes and pipelines under the installed release of transformers."""

import copy

import pytest
import torch
import transformers
from compat_families import make_pair
from hf_models import SEQ2SEQ, TEXT, batch, exact_norms, run, truth
from numerics import OUTPUT, assert_as_accurate
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import masking_utils

import transformer_fast
from transformer_fast.integrations.lazy_mask import LazyMask


@pytest.mark.parametrize("name", TEXT)
def test_attention_interface_and_accelerate(name):
    theirs = TEXT[name]()
    exact, plain = truth(theirs), exact_norms(copy.deepcopy(theirs))
    through = exact_norms(copy.deepcopy(theirs))
    through.set_attn_implementation("transformer_fast")
    swapped = copy.deepcopy(theirs)
    report = transformer_fast.accelerate(swapped, verbose=False)
    assert report.swapped
    inputs = batch("left" if name not in SEQ2SEQ else "right", seq2seq=name in SEQ2SEQ)
    with torch.no_grad():
        wanted, baseline = run(exact, inputs), run(plain, inputs)
        assert_as_accurate(run(through, inputs), wanted, baseline, OUTPUT, "attention interface")
        assert_as_accurate(run(swapped, inputs), wanted, run(theirs, inputs), OUTPUT, "accelerate")


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "t5", "bart"])
def test_generation_through_the_attention_interface(name):
    theirs = TEXT[name]()
    ours = copy.deepcopy(theirs)
    ours.set_attn_implementation("transformer_fast")
    inputs = batch("left")
    for options in ({}, {"num_beams": 2}, {"cache_implementation": "static"}):
        if "cache_implementation" in options and name in SEQ2SEQ:
            continue
        call = {**inputs, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, **options}
        if name == "t5":
            call["eos_token_id"] = 1
        assert torch.equal(ours.generate(**call), theirs.generate(**call)), options


def test_a_mask_of_documents_is_transformers_own():
    config = TEXT["mistral"]().config
    positions = torch.cat([torch.arange(4), torch.arange(1), torch.arange(10)])[None]
    for make in (masking_utils.create_causal_mask, masking_utils.create_sliding_window_causal_mask):
        masks = []
        for name in ("transformer_fast", "sdpa"):
            config._attn_implementation = name
            call = {"inputs_embeds": torch.zeros(1, 15, 32), "attention_mask": None, "past_key_values": None}
            masks.append(make(config, **call, position_ids=positions))
        assert isinstance(masks[0], LazyMask) and torch.equal(masks[0].dense(), masks[1])


AUTO = {
    "AutoModel": "BertModel",
    "AutoModelForMaskedLM": "DistilBertForMaskedLM",
    "AutoModelForCausalLM": "GPT2LMHeadModel",
    "AutoModelForSeq2SeqLM": "T5ForConditionalGeneration",
    "AutoModelForQuestionAnswering": "AlbertForQuestionAnswering",
    "AutoModelForSequenceClassification": "BartForSequenceClassification",
    "AutoModelForTokenClassification": "BertForTokenClassification",
}


@pytest.mark.parametrize("auto", AUTO)
def test_auto_classes(auto, tmp_path):
    _, theirs = make_pair(AUTO[auto])
    theirs.save_pretrained(tmp_path)
    model = getattr(transformer_fast, auto).from_pretrained(tmp_path)
    assert type(model) is getattr(transformer_fast, AUTO[auto])
    assert all(torch.equal(a, theirs.state_dict()[k]) for k, a in model.state_dict().items())


WORDS = "the capital of france is paris and a river there seine who wrote this book"


@pytest.fixture(scope="module")
def tokenizer():
    special = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "[MASK]", "[CLS]", "[SEP]"]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + WORDS.split())}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]", mask_token="[MASK]",
        cls_token="[CLS]", sep_token="[SEP]", model_max_length=40, padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


TEXTS = ["the capital of france is paris", "who wrote this book", "a river"]
TASKS = {
    "text-classification": ("BertForSequenceClassification", {}),
    "token-classification": ("DistilBertForTokenClassification", {}),
    "feature-extraction": ("AlbertModel", {}),
    "text-generation": ("GPT2LMHeadModel", {"max_new_tokens": 4, "do_sample": False}),
}


@pytest.mark.parametrize("task", TASKS)
def test_pipelines_of_transformers(task, tokenizer):
    name, options = TASKS[task]
    ours, theirs = make_pair(name)
    seen = transformer_fast.pipeline(task, model=ours, tokenizer=tokenizer, **options)(TEXTS)
    wanted = transformers.pipeline(task, model=theirs, tokenizer=tokenizer, **options)(TEXTS)
    _same(seen, wanted)


def _same(a, b) -> None:
    if isinstance(b, dict):
        assert list(a) == list(b)
        for key in b:
            _same(a[key], b[key])
    elif isinstance(b, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            _same(x, y)
    elif isinstance(b, (str, int)):
        assert a == b
    else:
        assert float(a) == pytest.approx(float(b), rel=1e-3, abs=1e-4)


def test_pipelines_of_our_own(tokenizer):
    ours, theirs = make_pair("T5ForConditionalGeneration")
    settings = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2, "eos_token_id": 2}
    inputs = tokenizer(TEXTS, return_tensors="pt", padding=True)
    wanted = tokenizer.batch_decode(theirs.generate(**inputs, **settings), skip_special_tokens=True)
    for task, key in (("summarization", "summary_text"), ("text2text-generation", "generated_text"),
                      ("translation_en_to_de", "translation_text")):  # fmt: skip
        pipe = transformer_fast.pipeline(task, model=ours, tokenizer=tokenizer)
        assert [found[key] for found in pipe(TEXTS, **settings)] == wanted
    ours, _ = make_pair("BertForQuestionAnswering")
    pipe = transformer_fast.pipeline("question-answering", model=ours, tokenizer=tokenizer)
    found = pipe(question="who wrote this book", context="a river there is the seine and paris")
    assert found["answer"] in "a river there is the seine and paris" and 0 <= found["score"] <= 1
