"""examples/translation_from_scratch.py, shortened: what it makes, prints and draws."""

import datetime
import importlib.util
import pathlib
import random
import re
import sys

import pytest
import torch

import transformer_fast as tf

EXAMPLE = pathlib.Path(__file__).resolve().parent.parent / "examples" / "translation_from_scratch.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("translation_from_scratch", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.quick
def test_pairs_say_the_same_date(example):
    for held_out in (False, True):
        for text, iso in example.pairs(200, random.Random(0), held_out):
            date = datetime.date.fromisoformat(iso)
            assert (date.toordinal() % 10 == 0) == held_out
            assert str(date.year) in text and str(date.day) in text
            assert date.strftime("%b").lower() in text or f".{date.month}." in text
            assert set(text) <= set(example.ALPHABET) and set(iso) <= set(example.ALPHABET)
            named = re.match(r"(\w+day), ", text)
            assert not named or named[1] == date.strftime("%A").lower()


@pytest.mark.quick
def test_batches(example):
    batch = example.batch([("3 mar 1998", "1998-03-03"), ("march 3, 1998", "1998-03-03")])
    assert batch["input_ids"].shape == (2, 13) and batch["attention_mask"].sum(1).tolist() == [10, 13]
    assert example.decode(batch["input_ids"][0]) == "3 mar 1998"
    assert example.decode(batch["labels"][1]) == "1998-03-03" and batch["labels"][0, -1] == example.END


@pytest.mark.quick
def test_least_loss_is_that_of_the_smoothed_labels(example):
    vocabulary = len(example.ALPHABET) + 3
    probabilities = torch.full((vocabulary,), example.SMOOTHING / vocabulary, dtype=torch.float64)
    probabilities[5] += 1 - example.SMOOTHING
    loss = tf.cross_entropy(probabilities.log()[None], torch.tensor([5]), label_smoothing=example.SMOOTHING)
    torch.testing.assert_close(loss.item(), example.least_loss(vocabulary))


@pytest.mark.parametrize("model", ["transformer", "rnn"])
def test_shortened_run(example, model, tmp_path, capsys):
    arguments = ["--model", model, "--steps", "40", "--size", "32", "--batch-size", "16", "--test", "20"]
    example.main(example.parse([*arguments, "--output", str(tmp_path)]))
    printed = capsys.readouterr().out
    first, last = map(float, re.search(r"loss ([\d.]+) -> ([\d.]+)", printed).groups())
    held_out, least = map(float, re.search(r"held-out dates ([\d.]+) \(least possible: ([\d.]+)", printed).groups())
    assert last < 0.9 * first and least < held_out < first
    assert re.search(r"translated exactly, of 20 held-out dates: [\d.]+% greedily, [\d.]+% with 4 beams", printed)
    assert len(re.findall(r"^  .+ -> [-\d]*( \(true: [-\d]{10}\))?$", printed, re.M)) == 5
    for name in ("learning_curve", "attention"):
        picture = tmp_path / f"{model}_{name}.png"
        assert str(picture) in printed and picture.read_bytes().startswith(b"\x89PNG")
    loaded = tf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / model)
    assert f"{loaded.num_parameters():,} parameters" in printed
