"""examples/embed_many.py: every row of every file, whatever happens to a worker or to the run."""

import os
import signal

import pytest
import torch

pytest.importorskip("ray", reason="ray is not installed: pip install 'transformer-fast[ray]'")
pytest.importorskip("pyarrow", reason="pyarrow, which ray[data] brings, is not installed")
import pyarrow
import pyarrow.parquet

import transformer_fast as tf


@pytest.fixture(scope="module")
def embed_many(example):
    return example("embed_many")


@pytest.fixture
def folder(tmp_path, texts):
    """Two kinds of files, a folder in the folder, row groups that no block fits, nulls and blanks."""
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
    """{(file, row): the answers}, of every file of the output."""
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
    """One text at a time, by the library alone."""
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

    # Without two of its files it computes those again and nothing else.
    monkeypatch.setattr(embed_many, "run", whole)
    parts = sorted((folder / "out").rglob("*.parquet"))
    times = {path: path.stat().st_mtime_ns for path in parts}
    for path in parts[2:4]:
        path.unlink()
    assert start(embed_many, folder, checkpoints["embed"], "--keep", "id", "--batch-size", 3)["done"] == 10
    assert rows(folder) == found
    assert {path for path in parts if path.stat().st_mtime_ns != times[path]} == set(parts[2:4])
    # Nothing is left to do: no worker starts.
    monkeypatch.setattr(embed_many, "run", None)
    assert start(embed_many, folder, checkpoints["embed"], "--keep", "id")["done"] == 0
    # Another question does not go into the same folder.
    with pytest.raises(SystemExit, match="--pooling.*begun with 'mean', got 'cls'"):
        start(embed_many, folder, checkpoints["embed"], "--keep", "id", "--pooling", "cls")
    with (folder / "texts" / "b.txt").open("a") as file:
        file.write("more\n")
    with pytest.raises(SystemExit, match="b.txt had .* bytes"):
        start(embed_many, folder, checkpoints["embed"], "--keep", "id")
