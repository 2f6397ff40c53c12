"""Tasks that transformers has give the results of its own pipelines, for every form of input."""

import pytest
import torch
import transformers
from hf_models import ENCODERS
from transformers.pipelines.pt_utils import KeyDataset

import transformer_fast

LABELS = {"id2label": {0: "O", 1: "B-LOC", 2: "I-LOC"}, "label2id": {"O": 0, "B-LOC": 1, "I-LOC": 2}}
CASES = {
    "sentiment-analysis": ("ForSequenceClassification", {"num_labels": 3}, {}),
    "text-classification": ("ForSequenceClassification", {"num_labels": 3}, {"top_k": None}),
    "ner": ("ForTokenClassification", LABELS, {}),
    "token-classification": ("ForTokenClassification", LABELS, {"aggregation_strategy": "average"}),
    "fill-mask": ("ForMaskedLM", {}, {"top_k": 3}),
    "feature-extraction": ("Model", {}, {}),
    "zero-shot-classification": (
        "ForSequenceClassification",
        {"id2label": {0: "contradiction", 1: "entailment"}, "label2id": {"contradiction": 0, "entailment": 1}},
        {"candidate_labels": ["river", "book"]},
    ),
    "text-generation": ("LMHeadModel", {"is_decoder": True}, {"max_new_tokens": 5, "do_sample": False}),
}


def assert_same(a, b):
    if isinstance(b, dict):
        assert isinstance(a, dict) and list(a) == list(b)
        for key in b:
            assert_same(a[key], b[key])
    elif isinstance(b, (list, tuple)):
        assert type(a) is type(b) and len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    elif isinstance(b, (str, int)):
        assert a == b
    else:
        assert float(a) == pytest.approx(float(b), rel=1e-3, abs=1e-4)


@pytest.mark.quick
@pytest.mark.parametrize("task", CASES)
def test_as_transformers(task, ours_and_theirs, texts):
    head, changes, arguments = CASES[task]
    ours, theirs = ours_and_theirs(task, head, changes, **arguments)
    if task == "fill-mask":
        texts = [t.replace(" the ", " [MASK] ", 1) if " the " in t else "[MASK] " + t for t in texts]
    expected = [theirs(text) for text in texts]
    assert_same(ours(texts[0]), expected[0])
    unwrapped = expected
    if task in ("sentiment-analysis", "text-classification"):
        unwrapped = theirs(texts)
    assert_same(ours(texts), unwrapped)
    assert_same(list(ours(text for text in texts)), unwrapped)
    data = KeyDataset([{"text": text} for text in texts], "text")
    assert_same(list(ours(data)), unwrapped)


@pytest.mark.parametrize(
    "task, name",
    [("fill-mask", "XLMRobertaForMaskedLM"), ("ner", "ElectraForTokenClassification"),
     ("sentiment-analysis", "MPNetForSequenceClassification")],
)  # fmt: skip
def test_other_encoders(task, name, tokenizer, texts, tmp_path):
    theirs = getattr(transformers, name)
    config = theirs.config_class(
        vocab_size=260, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        initializer_range=0.3, pad_token_id=0, num_labels=3,
    )  # fmt: skip
    theirs(config).save_pretrained(tmp_path)
    ours = transformer_fast.pipeline(task, tmp_path, tokenizer=tokenizer)
    assert type(ours.model) is getattr(transformer_fast, name)
    if task == "fill-mask":
        texts = [t.replace(" the ", " [MASK] ", 1) if " the " in t else "[MASK] " + t for t in texts]
    wanted = transformers.pipeline(task, str(tmp_path), tokenizer=tokenizer, device="cpu")
    assert_same(ours(texts), wanted(texts))


@pytest.mark.parametrize("task", ["sentiment-analysis", "token-classification", "fill-mask"])
def test_lists_are_batched_by_length(task, ours_and_theirs, texts, monkeypatch):
    head, changes, arguments = CASES[task]
    ours, theirs = ours_and_theirs(task, head, changes, **arguments)
    if task == "fill-mask":
        texts = ["[MASK] " + t for t in texts]
    lengths, forward = [], ours._forward

    def seen(inputs, **kwargs):
        lengths.append(tuple(inputs["input_ids"].shape))
        return forward(inputs, **kwargs)

    monkeypatch.setattr(ours, "_forward", seen)
    found = ours(texts, batch_size=3)
    assert_same(found, theirs(texts))
    rows, columns = zip(*lengths)
    assert rows == (3, 3, 2) and list(columns) == sorted(columns, reverse=True)
    lengths.clear()
    assert_same(ours(texts), found)
    assert len(lengths) == 1  # lists are batched automatically


@pytest.mark.quick
def test_words_of_one_sentence_stay_in_order(ours_and_theirs):
    head, changes, _ = CASES["ner"]
    ours, theirs = ours_and_theirs("ner", head, changes)
    words = ["the", "capital", "of", "unbelievably", "paris"]
    assert_same(ours(words, is_split_into_words=True), theirs(words, is_split_into_words=True))


def test_progress(ours_and_theirs, texts, capsys):
    head, changes, _ = CASES["sentiment-analysis"]
    ours, _ = ours_and_theirs("sentiment-analysis", head, changes)
    ours(texts)
    assert "text-classification" not in capsys.readouterr().err
    ours(texts, progress=True)
    assert "8/8" in capsys.readouterr().err
    ours.progress = True
    list(ours(text for text in texts))
    assert "8it" in capsys.readouterr().err
    with pytest.raises(ValueError):
        ours([*texts, 3])
    assert ours._bar is None


def test_empty_list(ours_and_theirs):
    head, changes, _ = CASES["sentiment-analysis"]
    assert ours_and_theirs("sentiment-analysis", head, changes)[0]([]) == []


def test_models_and_tokenizers_as_objects(checkpoint, tokenizer, texts):
    folder = checkpoint("ForSequenceClassification")
    model = transformer_fast.AutoModelForSequenceClassification.from_pretrained(folder)
    by_folder = transformer_fast.pipeline("sentiment-analysis", folder)
    assert_same(transformer_fast.pipeline("sentiment-analysis", model, tokenizer=tokenizer)(texts), by_folder(texts))
    assert_same(transformer_fast.pipeline("sentiment-analysis", model)(texts), by_folder(texts))
    half = transformer_fast.pipeline("sentiment-analysis", str(folder), dtype=torch.bfloat16, batch_size=4)
    assert half.model.dtype == torch.bfloat16 and len(half(texts)) == len(texts)


def test_a_family_that_only_transformers_has(tmp_path, tokenizer, texts):
    config = transformers.ErnieConfig(
        vocab_size=260, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    transformers.ErnieForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="no class for model_type 'ernie'.*ErnieFor.* parts of it accelerated"):
        ours = transformer_fast.pipeline("sentiment-analysis", tmp_path, tokenizer=tokenizer)
    assert ours.model.config._attn_implementation == "transformer_fast"
    theirs = transformers.pipeline("text-classification", str(tmp_path), tokenizer=tokenizer, device="cpu")
    assert_same(ours(texts), theirs(texts))


def test_a_model_that_is_of_no_use_for_the_task(tokenizer, tmp_path):
    ENCODERS["bert"]().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has model_type 'bert', which has no model for the task 'summarization'"):
        transformer_fast.pipeline("summarization", tmp_path, tokenizer=tokenizer)


def test_unknown_tasks(tokenizer):
    with pytest.raises(ValueError, match="task: 'sentiment' is unknown; there are .*question-answering.*translation"):
        transformer_fast.pipeline("sentiment")
    with pytest.raises(ValueError, match=r"'image-classification' is unknown \(transformers.pipeline has it\)"):
        transformer_fast.pipeline("image-classification")
    with pytest.raises(ValueError, match="model: wanted one, as the given tokenizer"):
        transformer_fast.pipeline("ner", tokenizer=tokenizer)
    with pytest.raises(TypeError, match="model: wanted a checkpoint's name or a PreTrainedModel, got int"):
        transformer_fast.pipeline("ner", 3)


def test_a_head_the_checkpoint_lacks(checkpoint, caplog):
    folder = checkpoint("ForMaskedLM")
    transformers.logging.enable_propagation()
    transformer_fast.pipeline("ner", folder)
    assert "classifier.weight" in caplog.text and "MISSING" in caplog.text


@pytest.mark.parametrize(
    "package, text",
    [
        ("sentencepiece", "MarianTokenizer requires the SentencePiece library but it was not found"),
        ("sentencepiece", "`tiktoken` is required to read a `tiktoken` file."),
        ("sacremoses", "You need to install sacremoses to use FSMTTokenizer."),
    ],
)
def test_a_tokenizer_that_needs_a_package(package, text, checkpoint, monkeypatch):
    folder = checkpoint("ForMaskedLM")

    def fail(*args, **kwargs):
        raise ImportError(text)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=f"its tokenizer needs {package}.* pip install {package}"):
        transformer_fast.pipeline("fill-mask", folder)
