"""examples/embed_many.py: all rows of all files are computed, also after the loss of a worker or of the run."""

import copy
import importlib.util
import json
import os
import pathlib
import shutil
import signal

import pytest
import torch

if importlib.util.find_spec("ray") is None:
    pytest.skip("ray is not installed: pip install 'transformer-fast[ray]'", allow_module_level=True)
import pyarrow
import pyarrow.parquet

import transformer_fast as tf

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def embed_many(example):
    return example("embed_many")


@pytest.fixture
def folder(tmp_path, texts):
    """Both kinds of files, a subfolder, row groups that do not match the blocks, nulls and blanks."""
    inputs = tmp_path / "texts"
    (inputs / "more").mkdir(parents=True)
    rows = [*texts[:20], None, "  ", texts[20]]
    table = pyarrow.table({"text": rows, "id": [f"n{i}" for i in range(len(rows))]})
    pyarrow.parquet.write_table(table, inputs / "more" / "a.parquet", row_group_size=9)
    (inputs / "b.txt").write_text("\n".join([*texts[21:32], "", *texts[32:]]), encoding="utf-8")
    (inputs / "_ignored.txt").write_text("not data")
    return tmp_path


def start(example, folder, checkpoint, *more):
    given = ["--input", folder / "texts", "--output", folder / "out", "--checkpoint", checkpoint, "--block-rows", 5]
    return example.main(example.parse([str(one) for one in (*given, *more)]))


def rows(folder):
    """{(file, row): the answers}, from all files of the output."""
    found = {}
    for path in sorted((folder / "out").rglob("*.parquet")):
        assert not path.name.startswith(".")
        for row in pyarrow.parquet.read_table(path, partitioning=None).to_pylist():
            key = row.pop("file"), row.pop("row")
            assert key not in found
            found[key] = row
    return found


def wanted(folder):
    table = pyarrow.parquet.read_table(folder / "texts" / "more" / "a.parquet")
    lines = (folder / "texts" / "b.txt").read_text().split("\n")
    named = {os.path.join("more", "a.parquet"): table["text"].to_pylist(), "b.txt": lines}
    return {(name, i): text for name, some in named.items() for i, text in enumerate(some)}


def vectors(checkpoint, some):
    """Embeddings of one text at a time, without the example."""
    model, tokenizer = tf.AutoModel.from_pretrained(checkpoint), tf.AutoTokenizer.from_pretrained(checkpoint)
    return {key: tf.layer_features(model, t, tokenizer, pooling="mean") for key, t in some.items() if t and t.strip()}


def same_vectors(found, expected):
    for key, row in found.items():
        if key not in expected:
            assert row["embedding"] is None
        else:
            torch.testing.assert_close(torch.tensor(row["embedding"]), expected[key])
    assert sum(row["embedding"] is not None for row in found.values()) == len(expected)


def test_every_row_though_a_worker_is_killed_and_a_second_run_goes_on(embed_many, folder, checkpoints, monkeypatch):
    killed = []
    whole = embed_many.run

    def one_dies(*given):
        for answer in whole(*given):
            if not killed:
                killed.append(answer["process"])
                os.kill(answer["process"], signal.SIGKILL)
            yield answer

    monkeypatch.setattr(embed_many, "run", one_dies)
    report = start(embed_many, folder, checkpoints["embed"], "--workers", 2, "--keep", "id", "--batch-size", 3)
    asked = wanted(folder)
    assert report["done"] == report["rows"] == len(asked) == 43 and not report["errors"]
    assert killed and report["processes"] - set(killed)
    found = rows(folder)
    assert found.keys() == asked.keys()
    expected = vectors(checkpoints["embed"], asked)
    same_vectors(found, expected)
    assert all(row["id"] == f"n{i}" for (name, i), row in found.items() if name != "b.txt")

    # If two output files are missing, only these are computed again.
    monkeypatch.setattr(embed_many, "run", whole)
    parts = sorted((folder / "out").rglob("*.parquet"))
    times = {path: path.stat().st_mtime_ns for path in parts}
    for path in parts[2:4]:
        path.unlink()
    assert start(embed_many, folder, checkpoints["embed"], "--keep", "id", "--batch-size", 3)["done"] == 10
    again = rows(folder)
    assert again.keys() == found.keys()
    assert all(row.get("id") == found[key].get("id") for key, row in again.items())
    same_vectors(again, expected)
    assert {path for path in parts if path.stat().st_mtime_ns != times[path]} == set(parts[2:4])
    # If nothing is left to do, no worker starts.
    monkeypatch.setattr(embed_many, "run", None)
    assert start(embed_many, folder, checkpoints["embed"], "--keep", "id")["done"] == 0
    # A node without the model is named.
    there = embed_many.parse(
        ["--input", "a", "--output", str(folder / "out"), "--checkpoint", str(checkpoints["embed"])]
    )
    embed_many.check_nodes(there)
    there.checkpoint = "/nowhere/model"
    with pytest.raises(SystemExit, match="node .*: --checkpoint: /nowhere/model is not there"):
        embed_many.check_nodes(there)
    # Other settings are refused in the same folder.
    with pytest.raises(SystemExit, match="--pooling.*begun with 'mean', got 'cls'"):
        start(embed_many, folder, checkpoints["embed"], "--keep", "id", "--pooling", "cls")
    with (folder / "texts" / "b.txt").open("a") as file:
        file.write("more\n")
    with pytest.raises(SystemExit, match="b.txt had .* bytes"):
        start(embed_many, folder, checkpoints["embed"], "--keep", "id")


def worker(embed_many, folder, checkpoint, *more):
    """Run a worker in this process on all blocks in order, as Ray would."""
    given = ["--input", folder / "texts", "--output", folder / "out", "--checkpoint", checkpoint, "--block-rows", 50]
    arguments = embed_many.parse([str(one) for one in (*given, *more)])
    made = embed_many.Worker(arguments)
    _, todo, broken = embed_many.plan(arguments)
    return [made({"block": [json.dumps(block)]}) for block in todo], broken


@pytest.fixture(scope="module")
def alone():
    """The module without Ray."""
    spec = importlib.util.spec_from_file_location("embed_many_alone", EXAMPLES / "embed_many.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("task", ["classify", "summarize"])
def test_labels_and_summaries(alone, folder, checkpoints, task):
    limits = ["--max-new-tokens", 5] if task == "summarize" else []
    answers, broken = worker(alone, folder, checkpoints[task], "--task", task, *limits)
    assert not broken and [a["error"] for a in answers] == [[""], [""]]
    found, asked = rows(folder), wanted(folder)
    assert found.keys() == asked.keys()
    pipe = tf.pipeline({"classify": "text-classification", "summarize": "summarization"}[task], str(checkpoints[task]))
    for key, text in asked.items():
        if not text or not text.strip():
            assert set(found[key].values()) == {None}
        elif task == "classify":
            (one,) = pipe([text])
            assert found[key]["label"] == one["label"]
            assert found[key]["score"] == pytest.approx(one["score"], abs=1e-5)
        else:
            assert found[key]["summary"] == pipe(text, max_new_tokens=5)[0]["summary_text"]


def test_labels_without_a_padding_token(alone, folder, checkpoints, tokenizer):
    bare = shutil.copytree(checkpoints["classify"], folder / "bare")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(bare)
    answers, broken = worker(alone, folder, bare, "--task", "classify")
    assert not broken and [a["error"] for a in answers] == [[""], [""]]


def test_damaged_files_cost_their_own_blocks(alone, folder, checkpoints):
    inputs = folder / "texts"
    (inputs / "cut.parquet").write_bytes((inputs / "more" / "a.parquet").read_bytes()[:-20])
    (inputs / "latin.txt").write_bytes("caf\xe9\n".encode("latin-1"))
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), inputs / "other.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": [1]}), inputs / "numbers.parquet")
    answers, broken = worker(alone, folder, checkpoints["embed"])
    assert len(broken) == 2 and "cut.parquet" in broken[0] and "no column 'text'; it has body" in broken[1]
    errors = [error for answer in answers for error in answer["error"] if error]
    assert len(errors) == 2
    assert "latin.txt, rows 0 to 1" in errors[0] and "utf-8" in errors[0]
    assert "numbers.parquet" in errors[1] and "wanted text, got int64" in errors[1]
    assert rows(folder).keys() == wanted(folder).keys()


def test_what_there_is_not(alone, folder, tmp_path, checkpoints, monkeypatch):
    empty = tmp_path / "empty"
    empty.mkdir()
    for given, reason in (
        (["--input", tmp_path / "no"], "no is not there"),
        (["--input", empty], "has no .parquet or .txt files"),
    ):
        with pytest.raises(SystemExit, match=reason):
            start(alone, folder, checkpoints["embed"], *given)
    (empty / "a.txt").write_text("")
    with pytest.raises(SystemExit, match="has no rows"):
        start(alone, folder, checkpoints["embed"], "--input", empty)
    assert "--checkpoint" in alone.look_around("/nowhere/model", True, str(tmp_path))
    assert "--output" in alone.look_around(str(tmp_path), True, "/nowhere/out/_embed_many.json")
    assert alone.look_around(str(tmp_path), True, str(tmp_path)) == ""
    monkeypatch.setattr(alone.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install 'transformer-fast\[ray\]'"):
        start(alone, folder, checkpoints["embed"])


def test_why_workers_end(alone):
    told = "The actor died because of an error in its creation task\n  File ...\nOSError: no such model\n\nTo change"
    assert alone.reason(RuntimeError(told)) == "OSError: no such model"
    assert "ended more than 5 workers" in alone.reason(RuntimeError("The actor is unavailable"))


def test_arguments(alone, capsys):
    for given, reason in (
        (["--workers", "0"], "--workers: wanted at least 1, got 0"),
        (["--task", "classify"], "wants"),
    ):
        with pytest.raises(SystemExit):
            alone.parse(["--input", "a", "--output", "b", *given])
        assert reason in capsys.readouterr().err
