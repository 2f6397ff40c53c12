"""text2text-generation, summarization and translation: the texts equal those of generate and the tokenizer."""

import functools

import pytest
import torch
import transformers
from transformers.pipelines.pt_utils import KeyDataset

import transformer_fast
from transformer_fast.pipelines import TranslationPipeline

NAMES = {"text2text-generation": "generated", "summarization": "summary", "translation": "translation"}
SHORT = {"max_new_tokens": 6, "num_beams": 2}


@pytest.fixture
def folder(make_seq2seq, seq2seq_tokenizer, tmp_path):
    def make(family: str, **changes):
        make_seq2seq(family, **changes).save_pretrained(tmp_path / family)
        seq2seq_tokenizer.save_pretrained(tmp_path / family)
        return tmp_path / family

    return make


@functools.lru_cache(maxsize=1)
def loaded(folder):
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder), model


def by_hand(folder, text: str, **arguments) -> list[str]:
    """Tokenise, generate, decode: one text at a time, with transformers."""
    tokenizer, model = loaded(folder)
    found = model.generate(**tokenizer(text, return_tensors="pt"), **arguments)
    return tokenizer.batch_decode(found, skip_special_tokens=True)


@pytest.mark.quick
@pytest.mark.parametrize("task, family", [*zip(NAMES, ["t5", "bart", "marian"]), ("translation", "t5")])
def test_texts_by_hand(task, family, folder, texts):
    texts = texts[:5]
    path = folder(family)
    pipe = transformer_fast.pipeline(task, path, device="cpu", **SHORT)
    assert type(pipe.model).__module__.startswith("transformer_fast.")
    key = f"{NAMES[task]}_text"
    expected = [by_hand(path, text, **SHORT)[0] for text in texts]
    assert len(set(expected)) > 1
    assert pipe(texts[0]) == [{key: expected[0]}]
    answers = [{key: text} for text in expected]
    assert pipe(texts, batch_size=1) == answers
    assert pipe(tuple(texts), batch_size=2) == answers
    assert [found[0] for found in pipe(text for text in texts)] == answers
    data = KeyDataset([{"text": text} for text in texts], "text")
    assert [found[0] for found in pipe(data)] == answers
    assert pipe([]) == []


def test_several_sequences_and_tokens(folder, texts):
    path = folder("bart")
    pipe = transformer_fast.pipeline("text2text-generation", path, device="cpu")
    call = {"max_new_tokens": 5, "num_beams": 3, "num_return_sequences": 3}
    found = pipe(texts[:3], **call)
    assert [[r["generated_text"] for r in one] for one in found] == [by_hand(path, t, **call) for t in texts[:3]]
    (record,) = pipe(texts[0], return_tensors=True, max_new_tokens=5)
    assert list(record) == ["generated_token_ids"] and record["generated_token_ids"].dtype == torch.long
    (record,) = pipe(texts[0], return_tensors=True, return_text=True, max_new_tokens=5)
    assert list(record) == ["generated_token_ids", "generated_text"]


@pytest.mark.quick
def test_what_the_checkpoint_says_for_a_task(folder, texts):
    """Prefix and generation arguments of task_specific_params; the call's arguments override them."""
    params = {
        "summarization": {"prefix": "summary : ", "max_length": 9, "num_beams": 3, "min_length": 4},
        "translation_en_to_de": {"prefix": "english to german : ", "max_length": 7, "num_beams": 1},
    }
    path = folder("t5", task_specific_params=params)
    pipe = transformer_fast.pipeline("summarization", path, device="cpu")
    text = texts[0]
    plain = {k: v for k, v in params["summarization"].items() if k != "prefix"}
    assert pipe(text)[0]["summary_text"] == by_hand(path, "summary : " + text, **plain)[0]
    assert pipe(text, prefix="", num_beams=2)[0]["summary_text"] == by_hand(path, text, **(plain | {"num_beams": 2}))[0]
    german = transformer_fast.pipeline("translation_en_to_de", path, device="cpu")
    assert type(german) is TranslationPipeline and german.task == "translation_en_to_de"
    expected = by_hand(path, "english to german : " + text, max_length=7, num_beams=1)
    assert german(text)[0]["translation_text"] == expected[0]


def test_defaults_fill_what_nobody_says(folder):
    pipe = transformer_fast.pipeline("translation", folder("marian"), device="cpu")
    assert pipe._generate_arguments({}) == {"max_new_tokens": 256, "num_beams": 4}
    assert pipe._generate_arguments({"max_length": 20, "num_beams": 1}) == {"max_length": 20, "num_beams": 1}
    pipe.model.generation_config.num_beams = 6
    pipe.model.generation_config.max_length = 40
    assert pipe._generate_arguments({}) == {}
    config = transformers.GenerationConfig(max_new_tokens=3)
    assert pipe._generate_arguments({"generation_config": config}) == {"generation_config": config}


def test_languages(folder, seq2seq_tokenizer, texts, monkeypatch):
    """Languages are passed to tokenizers that need them, and not to others."""
    path = folder("marian")
    pipe = transformer_fast.pipeline("translation_en_to_fr", path, device="cpu", **SHORT)
    asked = []

    def build(text, return_tensors, src_lang, tgt_lang, truncation):
        asked.append((src_lang, tgt_lang))
        return pipe.tokenizer(text, return_tensors=return_tensors)

    plain = pipe(texts[0])
    pipe.tokenizer._build_translation_inputs = build
    assert pipe(texts[0]) == plain
    pipe(texts[0], src_lang="de", tgt_lang="pl")
    assert asked == [("en", "fr"), ("de", "pl")]
    pipe.task, pipe._preprocess_params = "translation", {}
    with pytest.raises(ValueError, match="src_lang: .* wants a language"):
        pipe(texts[0])


def test_stop_sequence_and_truncation(folder, texts):
    pipe = transformer_fast.pipeline("text2text-generation", folder("bart"), device="cpu", max_new_tokens=12)
    ids = pipe(texts[0], return_tensors=True)[0]["generated_token_ids"]
    word = pipe.tokenizer.decode(ids[3:4])
    stopped = pipe(texts[0], return_tensors=True, stop_sequence=word, num_beams=1)[0]["generated_token_ids"]
    assert len(stopped) <= len(ids)
    long = " ".join(texts * 3)
    assert pipe.preprocess(long, truncation=True)["input_ids"].shape[1] == pipe.tokenizer.model_max_length


@pytest.mark.parametrize("given", [3, None, {"text": "x"}])
def test_bad_input(folder, given):
    pipe = transformer_fast.pipeline("summarization", folder("bart"), device="cpu")
    with pytest.raises(ValueError, match="inputs: wanted text"):
        pipe(given)


def test_a_model_that_is_no_encoder_decoder(checkpoint, tokenizer):
    model = transformer_fast.AutoModelForMaskedLM.from_pretrained(checkpoint("ForMaskedLM"))
    with pytest.raises(ValueError, match="summarization wants an encoder-decoder that generates, got BertForMaskedLM"):
        transformer_fast.pipeline("summarization", model, tokenizer=tokenizer)


def test_transformers_registry_knows_them():
    from transformers.pipelines import PIPELINE_REGISTRY

    tasks = PIPELINE_REGISTRY.get_supported_tasks()
    assert {"question-answering", "summarization", "translation", "text2text-generation"} <= set(tasks)
    assert PIPELINE_REGISTRY.supported_tasks["translation"]["impl"] is TranslationPipeline
