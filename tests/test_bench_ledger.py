"""The ledger of what has run on a GPU, and a benchmark run with few packages installed."""

import importlib.util
import json
import pathlib
import re

import pytest
from transformer_fast.benchmarks import ledger, results, run
from transformer_fast.benchmarks.progress import Progress

from transformer_fast.backends import cuda, triton

pytestmark = pytest.mark.quick
ROOT = pathlib.Path(__file__).resolve().parent.parent
REPORT = """<testsuites><testsuite>
<testcase classname="tests.ops.test_attention_triton" name="test_padded[cuda-plain]" time="1"/>
<testcase classname="tests.ops.test_attention_triton" name="test_unpadded[cuda]"/>
<testcase classname="tests.ops.test_attention_triton" name="test_shipped_tiles[cuda-causal-64]"/>
<testcase classname="tests.ops.test_any_strides" name="test_any_strides[cuda-cross_entropy-expanded-triton]"/>
<testcase classname="tests.ops.test_any_strides" name="test_any_strides[cuda-rotary_embedding-expanded-cuda]"/>
<testcase classname="tests.ops.test_norm_triton" name="a[cuda]"/>
<testcase classname="tests.ops.test_norm_triton" name="b[cuda]"><failure message="no">text</failure></testcase>
<testcase classname="tests.ops.test_dropout_triton" name="c[cuda]"><skipped message="none"/></testcase>
</testsuite></testsuites>"""


def _ledger(folder, report):
    (folder / "tests").mkdir(exist_ok=True)
    (folder / "tests" / "group.xml").write_text(report)
    return ledger.write(folder)


def test_an_op_is_verified_when_its_tests_pass_on_the_gpu(tmp_path):
    assert _ledger(tmp_path, REPORT) == {"attention": 3, "cross_entropy": 1}
    assert json.loads((tmp_path / "verified.json").read_text()) == {"attention": 3, "cross_entropy": 1}


def test_attention_is_verified_with_the_tiles_that_are_shipped_alone(tmp_path):
    assert "attention" not in _ledger(tmp_path, REPORT.replace("test_shipped_tiles", "test_of_others"))


def test_what_was_cut_short_is_not_verified(tmp_path):
    short = '<testcase classname="tests.ops.test_any_strides" name="all tests were run"><error/></testcase>'
    assert _ledger(tmp_path, REPORT.replace("</testsuite>", f"{short}</testsuite>")) == {"attention": 3}


def test_outcomes_of_a_run_that_was_killed_are_read_and_not_believed_whole(tmp_path):
    (tmp_path / "tests").mkdir()
    line = json.dumps({"id": "tests/ops/test_norm_cuda.py::a", "outcome": "passed", "seconds": 1, "message": ""})
    (tmp_path / "tests" / "cuda-norm.jsonl").write_text(f"{line}\n{line[:30]}")
    assert ledger.write(tmp_path) == {}


def test_every_op_on_a_gpu_has_a_test_file_in_the_ledger():
    assert set(ledger.OPS) == triton.BACKEND.ops() | {f"cuda {op}" for op in cuda.BACKEND.ops()}
    files = [path.stem for path in (ROOT / "tests" / "ops").glob("test_*.py")]
    assert all(any(re.search(p.partition("(")[0], name) for name in files) for p in ledger.OPS.values())


def test_info_and_readme_follow_the_committed_ledger():
    folders = [results.ROOT.glob("cuda-*/*/verified.json")]
    named = {op for paths in folders for path in paths for op in json.loads(path.read_text())}
    assert triton.verified_on_gpu() == named & triton.BACKEND.ops()
    assert cuda.verified_on_gpu() == {op for op in cuda.BACKEND.ops() if f"cuda {op}" in named}
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert ("Not yet run on a GPU" in readme) == (not named)


def test_a_run_needs_neither_tqdm_nor_matplotlib_nor_psutil(tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    absent = ("tqdm", "matplotlib", "psutil")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in absent else find(name, *a))
    with Progress(2) as bar:
        bar.describe("a")
        bar.detail("b")
        bar.line("a line")
        bar.update()
    run._draw(tmp_path)
    assert capsys.readouterr().out.splitlines()[0] == "a line"
    source = (ROOT / "benchmarks" / "run.py").read_text()
    assert not re.search(r"^(?:import|from) (?:tqdm|matplotlib|psutil|.*\.memory|.*\.plot)\b", source, re.M)


def test_what_the_sanitizer_watches_runs():
    from transformer_fast.benchmarks import sanitize

    sanitize.main("cpu")


def test_memory_is_checked_block_by_block(tmp_path, monkeypatch, capfd):
    """compute-sanitizer cannot see errors inside the blocks of torch's caching allocator."""
    from transformer_fast.benchmarks import flight

    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\necho "caching off: $PYTORCH_NO_CUDA_MEMORY_CACHING" "$@"\nexit 7\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert flight.memcheck() == 7
    said = capfd.readouterr().out
    assert "caching off: 1" in said and "--tool memcheck --error-exitcode 1" in said and "sanitize.py --cuda" in said
    tool.unlink()
    assert flight.memcheck() == 0 and "not on PATH" in capfd.readouterr().out
