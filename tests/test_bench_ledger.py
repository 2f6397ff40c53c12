"""The ledger of what a GPU has run, and a benchmark run where little is installed."""

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
<testcase classname="tests.ops.test_attention_triton" name="test_packed[cuda]"/>
<testcase classname="tests.ops.test_norm_triton" name="a[cuda]"/>
<testcase classname="tests.ops.test_norm_triton" name="b[cuda]"><failure message="no">text</failure></testcase>
<testcase classname="tests.ops.test_dropout_triton" name="c[cuda]"><skipped message="none"/></testcase>
</testsuite></testsuites>"""


def test_an_op_is_verified_when_its_tests_pass_on_the_gpu(tmp_path):
    (tmp_path / "tests.xml").write_text(REPORT)
    assert ledger.write(tmp_path) == {"attention": 2}
    assert json.loads((tmp_path / "verified.json").read_text()) == {"attention": 2}


def test_every_op_on_a_gpu_has_a_test_file_in_the_ledger():
    assert set(ledger.OPS) == triton._OPS | {f"cuda {op}" for op in cuda._OPS}
    files = [path.stem for path in (ROOT / "tests" / "ops").glob("test_*.py")]
    assert all(any(re.search(pattern, name) for name in files) for pattern in ledger.OPS.values())


def test_info_and_readme_follow_the_committed_ledger():
    folders = [results.ROOT.glob("cuda-*/*/verified.json")]
    named = {op for paths in folders for path in paths for op in json.loads(path.read_text())}
    assert triton.verified_on_gpu() == named & triton._OPS
    assert cuda.verified_on_gpu() == {op for op in cuda._OPS if f"cuda {op}" in named}
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


def test_gpu_script_stays_within_ten_minutes():
    text = (ROOT / "benchmarks" / "gpu.sh").read_text()
    limits = [int(n) for n in re.findall(r"^\s*step \S+ (\d+)", text, re.M)]
    assert len(limits) >= 5 and sum(limits) + 2 * limits[3] <= 590  # the sanitizer's step runs three times


def test_what_the_sanitizer_watches_runs():
    from transformer_fast.benchmarks import sanitize

    sanitize.main("cpu")
