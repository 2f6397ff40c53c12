"""README's tables are generated from the results and match the committed ones."""

import json
import subprocess

import pytest
from transformer_fast.benchmarks import results, tables
from transformer_fast.benchmarks.case import OURS

TEXT = "before\n<!-- results:cpu/bars -->\nold\n<!-- /results -->\nbetween\n<!-- results:cuda -->\n<!-- /results -->\n"


@pytest.fixture
def root(tmp_path):
    about = {
        "device": "cpu-test-2c", "time": "2026-01-02T00:00:00", "commit": "abc", "cpu": "Test", "threads": 2,
        "isa": "avx2", "dirty": False, "versions": {"torch": "2.13", "openvino": "not installed"},
    }  # fmt: skip
    empty = dict.fromkeys(results.COLUMNS, "")
    case = {"case": "inference/bert-base-full", "group": "inference", "peer": "HF sdpa", "shape": "8 x 128"}
    rows = [
        empty | case | {"candidate": OURS, "median_s": "0.5", "ratio_to_peer": "2", "ratio_p20": "1.9",
                        "ratio_p80": "2.1", "peak_memory_mb": "450.2", "memory_met": "yes", "bar": ">= 1.15x",
                        "met": "yes"},
        empty | case | {"candidate": "HF sdpa", "median_s": "1", "ratio_to_peer": "1", "peak_memory_mb": "470.0"},
        empty | case | {"candidate": "OpenVINO", "note": "not installed: openvino"},
        empty | case | {"candidate": "HF with accelerate()", "median_s": "0.51", "ratio_to_peer": "1.96"},
        empty | {"case": "overhead/layer_norm", "group": "overhead", "candidate": OURS, "peer": "bare kernel",
                 "median_s": "9e-6", "bar": "<= 10 us more", "met": "yes", "note": "4.5 us more than bare kernel"},
        empty | {"case": "attention-forward/fp32-b8-s128", "group": "attention-forward", "candidate": OURS,
                 "median_s": "0.001", "tflops": "0.15"},
        *(empty | {"case": "generation/gpt2-b1", "group": "generation", "peer": "HF sdpa"} | row for row in (
            {"candidate": OURS, "median_s": "0.5", "ratio_to_peer": "4"},
            {"candidate": "HF sdpa", "median_s": "2", "ratio_to_peer": "1"},
            {"candidate": "OpenVINO int8", "median_s": "0.8", "ratio_to_peer": "2.5"},
            {"candidate": "CTranslate2 int8", "note": "failed: RuntimeError: why"},
        )),
    ]  # fmt: skip
    ceilings = {"gemm": {"fp32": 2e11, "bf16": 4e11, "fp16": 4e11}, "copy": 4e10}
    results.write(results.result_folder(about, tmp_path), rows, ceilings, about)
    return tmp_path


@pytest.mark.quick
def test_blocks_are_filled_and_the_rest_stays(root):
    filled = tables.fill(TEXT, root)
    assert filled.startswith("before\n<!-- results:cpu/bars -->\n| work |") and "\nbetween\n" in filled
    assert "| inference: bert base full | HF sdpa | >= 1.15x | 2.00x | 1.90x..2.10x | yes | 450 (470) |" in filled
    assert "| overhead: layer_norm | bare kernel | <= 10 us more | 4.5 us |  | yes |  |" in filled
    assert "No results of a cuda device are committed yet" in filled and "old" not in filled
    assert tables.fill(filled, root) == filled


@pytest.mark.quick
def test_every_table(root):
    whole = tables.render("cpu", root)
    assert "fp32 200, bf16 400 GFLOP/s, copy 40 GB/s" in whole and "cpu-test-2c/2026-01-02-abc" in whole
    assert f"| inference, speed-up over the peer | size | peer's time | {OURS} | OpenVINO |" in whole
    assert "| bert base full | 8 x 128 | 1.00 s (HF sdpa) | **2.00x** | not installed | 1.96x |" in whole
    assert [line for line in whole.splitlines() if line.startswith("#")] == [
        "### Goals", "### Whole models", "### Generation", "### Attention",
    ]  # fmt: skip
    assert "| attention forward: fp32 b8 s128 | 150 |" in whole
    assert f"| generation, speed-up over the peer | size | peer's time | {OURS} | OpenVINO int8 | CTranslate2" in whole
    assert "| gpt2 b1 |  | 2.00 s (HF sdpa) | **4.00x** | 2.50x | failed |" in whole
    for name in set(tables.TABLES) - {"headline", "doors"}:
        assert tables.render(f"cpu/{name}", root) in whole
    with pytest.raises(ValueError, match="no table 'wrong'"):
        tables.render("cpu/wrong", root)


@pytest.mark.quick
def test_check_changes_nothing(root, tmp_path, capsys):
    file = tmp_path / "page.md"
    file.write_text(TEXT)
    arguments = ["--file", str(file), "--results", str(root)]
    assert tables.main([*arguments, "--check"]) == 1 and file.read_text() == TEXT
    assert tables.main(arguments) == 0 and file.read_text() != TEXT
    assert tables.main([*arguments, "--check"]) == 0


@pytest.mark.quick
def test_only_committed_results_count(root):
    def git(*args):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
        subprocess.run(["git", "-C", str(root), *identity, *args], check=True, capture_output=True)

    git("init")
    assert "No results" in tables.render("cpu", root)
    git("add", ".")
    assert "No results" not in tables.render("cpu", root)
    about = json.loads(next(root.glob("*/*/machine.json")).read_text())
    newer = about | {"time": "2027-01-01T00:00:00", "commit": "uncommitted"}
    results.write(results.result_folder(newer, root), [], {"gemm": {}, "copy": 1.0}, newer)
    assert "abc" in tables.render("cpu/machine", root)


@pytest.mark.quick
@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_pages_are_up_to_date(page):
    if not page.exists():
        pytest.skip(f"{page.name} lies only in a checkout")
    text = page.read_text()
    assert tables.fill(text) == text, "run: python benchmarks/tables.py"


@pytest.mark.quick
def test_doors_of_cases_that_measured_more_than_one(root):
    lines = tables.render("cpu/doors", root).splitlines()
    assert lines[0] == "| work | peer | import | accelerate | attn_implementation |"
    assert lines[2:] == ["| inference: bert base full | HF sdpa | **2.00x** | 1.96x |  |"]


@pytest.mark.quick
def test_headline_names_the_fastest_other_tool(root):
    lines = tables.render("cpu/headline", root).splitlines()
    words = tables.HEADLINE["generation/gpt2-b1"]
    assert lines[2:] == [f"| {words} | 2.00 s | 500 ms | **4.00x** | OpenVINO int8 2.50x |"]


@pytest.mark.quick
def test_a_gpu_s_cases_come_from_its_newest_run_that_has_them(tmp_path, monkeypatch):
    named = {f"attention-{kind}/bf16-b4-s4096": words for kind, words in (("forward", "it"), ("backward", "gradients"))}
    monkeypatch.setattr(tables, "HEADLINE_GPU", named)

    def run(commit, **ratios):
        about = {"device": "cuda-test", "time": f"2026-01-0{commit}T00:00:00", "commit": f"{commit}" * 9, "gpu": "Test",
                 "dirty": False, "versions": {}}  # fmt: skip
        empty = dict.fromkeys(results.COLUMNS, "") | {"peer": "SDPA flash", "shape": "(4, 32, 4096, 64)"}
        rows = []
        for group, ratio in ratios.items():
            case = {"case": f"{group.replace('_', '-')}/bf16-b4-s4096", "group": group.replace("_", "-")}
            for name, value in ((OURS, ratio), (f"{OURS} cuda", 2 * ratio), ("SDPA flash", 1), ("SDPA cuDNN", 1.5)):
                timed = {"median_s": str(1e-3 / (value or 1)), "ratio_to_peer": str(value), "tflops": str(100 * value)}
                rows.append(empty | case | {"candidate": name} | (timed if value else {"note": "failed: why"}))
        ceilings = {"gemm": {"bf16": 7e14}, "copy": 4e12}
        results.write(results.result_folder(about, tmp_path), rows, ceilings, about)

    run(1, attention_forward=1.0, attention_backward=2.0, decode=3.0)
    run(2, attention_forward=4.0, decode=0)
    lines = tables.render("cuda/gpu", tmp_path).splitlines()
    assert lines[2:] == [
        "| it | SDPA flash, 1 ms | **4.00x** | 8.00x | SDPA cuDNN 1.50x |",
        "| gradients (at 1111111) | SDPA flash, 1 ms | **2.00x** | 4.00x | SDPA cuDNN 1.50x |",
    ]
    whole = tables.render("cuda", tmp_path)
    assert "bf16 700 TFLOP/s" in whole and "Commit 222222222" in whole
    assert "| attention forward: bf16 b4 s4096 | 400 | 800 | 100 | 150 |" in whole
    assert "| bf16 b4 s4096 (at 1111111) | (4, 32, 4096, 64) | 1 ms (SDPA flash) | **3.00x** | 6.00x | 1.50x |" in whole
    assert tables.render("cpu", tmp_path).startswith("*No results")
