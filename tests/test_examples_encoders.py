"""The examples on encoders, shortened and with a tiny random checkpoint: what they print, save and draw."""

import importlib.util
import pathlib
import sys

import pytest
import torch
import transformers
from tokenizers import BertWordPieceTokenizer

import transformer_fast as tf

EXAMPLES = pathlib.Path(__file__).resolve().parent.parent / "examples"
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny BERT with a WordPiece tokenizer trained on the examples' own data."""
    folder = tmp_path_factory.mktemp("checkpoint")
    made = BertWordPieceTokenizer()
    files = [str(path) for path in sorted((EXAMPLES / "data").iterdir())]
    made.train(files, vocab_size=600, show_progress=False)
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    made.save(str(folder / "tokenizer.json"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), model_max_length=256,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **{f"{name}_token": token for name, token in names.items()},
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=256, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def run(checkpoint, tmp_path, capsys):
    """Run an example's main with arguments; (its result, what it printed, its output folder)."""

    def start(name: str, *arguments: str):
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
            given = ["--checkpoint", str(checkpoint), "--output", str(tmp_path), *arguments]
            result = module.main(module.parse(given))
        finally:
            del sys.modules[name]
        return result, capsys.readouterr().out, tmp_path

    return start


def is_picture(path: pathlib.Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_sentence_features(run):
    results, printed, folder = run("sentence_features")
    assert len(results) == 12 and all(0 <= value <= 1 for value in results.values())
    assert max(results.values()) > 0.6  # words alone tell praise from complaint
    assert "BertModel, 4 layers; 300 reviews" in printed and printed.count("accuracy") == 12
    assert is_picture(folder / "sentence_features.png")


@pytest.mark.parametrize("freeze", [False, True])
def test_finetune_classifier(freeze, run):
    flags = ["--freeze"] if freeze else []
    (before, after), printed, folder = run("finetune_classifier", "--limit", "60", "--epochs", "2", *flags)
    assert f"accuracy on 20 reviews held out: {before:.1%} -> {after:.1%}" in printed
    assert ("66 of" in printed) == freeze  # 2 x 32 weights and 2 biases
    assert is_picture(folder / "learning_curve.png")
    model = tf.AutoModelForSequenceClassification.from_pretrained(folder / "model")
    assert model.config.id2label == {0: "negative", 1: "positive"}


def test_name_tagging(run):
    share, printed, folder = run("name_tagging", "--limit", "120", "--epochs", "6", "--lr", "5e-3")
    assert f"{share:.1%} of" in printed and share > 0.75
    assert is_picture(folder / "name_tagging.png")
    assert tf.AutoModelForTokenClassification.from_pretrained(folder / "model").config.label2id["B-PER"] == 1


def test_reading_answers(run):
    exact, printed, folder = run("reading_answers", "--steps", "6", "--test", "8")
    assert 0 <= exact <= 1 and "of 8 held-out questions answered exactly" in printed
    tokens = int(printed.split("one text of ")[1].split()[0])
    assert tokens > 600 and printed.count("characters") == 4  # more than a window
    assert is_picture(folder / "reading_answers.png")
    assert (folder / "model" / "model.safetensors").is_file()


def test_answers_are_where_the_data_say(checkpoint):
    spec = importlib.util.spec_from_file_location("reading_answers", EXAMPLES / "reading_answers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows = module.read(module.DATA)
    assert len(rows) == 800
    for row in rows:
        assert row["context"][row["start"] :].startswith(row["answer"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    batch = module.encode(rows[:8], tokenizer)
    for i, row in enumerate(rows[:8]):
        ids = batch["input_ids"][i, batch["start_positions"][i] : batch["end_positions"][i] + 1]
        assert tokenizer.decode(ids).replace(" ", "") == row["answer"].lower().replace(" ", "")
