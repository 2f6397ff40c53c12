"""The record of ahead-of-time compilation: how it is summarised, and the contents of the committed records."""

import csv
import re
import types

import pytest
import triton_aot

pytestmark = pytest.mark.quick
RECORDS = sorted(triton_aot.ROOT.glob("benchmarks/results/ahead-of-time/triton-*.csv"))


def _job(arch, dtype, key):
    kernel = types.SimpleNamespace(fn=types.SimpleNamespace(__name__="_some_kernel"))
    file = types.SimpleNamespace(check=triton_aot.assert_runs_well)
    return triton_aot.Job(file, "case", triton_aot.Launch(kernel, (), {}), arch, dtype, key)


def test_sums_up_what_has_been_compiled(monkeypatch):
    report = {"registers": 100, "warps": 4, "shared": 1000, "spills": 0, "wgmma": 8}
    found = {
        "a": report | {"arch": 90},
        "b": report | {"arch": 90, "registers": 120, "spills": 3, "wgmma": 0},
        "d": report | {"arch": 80, "shared": 200_000, "wgmma": 0},
    }
    monkeypatch.setattr(triton_aot, "known", lambda job: found.get(job.key))
    jobs = [_job(90, "bfloat16", "a"), _job(90, "bfloat16", "b"), _job(90, "bfloat16", "c"), _job(80, "float32", "d")]
    jobs.append(_job(100, "float16", "e"))
    hopper, blackwell, ampere = (
        dict(zip(triton_aot.RECORD[2:], [*kernel, *values]))
        for *kernel, values in (
            ("some_kernel", "bfloat16", "sm_90", [3, 2, 1, 120, 1000, 3, "some"]),
            ("some_kernel", "float16", "sm_100", [1, 0, 0, "", "", "", ""]),
            ("some_kernel", "float32", "sm_80", [1, 1, 1, 100, 200_000, 0, ""]),
        )
    )
    version = {"triton": "3.9.0", "commit": "abc"}
    assert triton_aot.summary(jobs, "3.9.0", "abc") == [version | row for row in (hopper, blackwell, ampere)]


def test_a_share_leaves_the_other_kernels_rows():
    def row(kernel, arch, commit, compiled=1):
        return {"kernel": kernel, "dtype": "bfloat16", "arch": f"sm_{arch}", "commit": commit, "compiled": compiled}

    before = [row("a", 80, "old"), row("a", 120, "old"), row("b", 90, "old")]
    now = [row("a", 80, "new"), row("a", 120, "new", compiled=0), row("c", 90, "new"), row("d", 90, "new", compiled=0)]
    merged = [(r["kernel"], r["arch"], r["commit"]) for r in triton_aot.merged(before, now)]
    assert merged == [
        ("a", "sm_80", "new"), ("a", "sm_120", "old"), ("b", "sm_90", "old"), ("c", "sm_90", "new"),
        ("d", "sm_90", "new"),
    ]  # fmt: skip


def test_a_record_is_there():
    assert {path.stem for path in RECORDS} >= {"triton-3.6.0", "triton-3.9.0"}


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_the_record_names_every_kernel(path):
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows and list(rows[0]) == triton_aot.RECORD
    sources = "".join(source.read_text() for source in (triton_aot.ROOT / "kernels").glob("*.py"))
    kernels = set(re.findall(r"^def _(\w+_kernel)\(", sources, re.M))
    for arch in triton_aot.ARCHS:
        assert {row["kernel"] for row in rows if row["arch"] == f"sm_{arch}"} == kernels
    for row in rows:
        assert 0 <= int(row["failed"]) <= int(row["compiled"]) <= int(row["configurations"]), row
