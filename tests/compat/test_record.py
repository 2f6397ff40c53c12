"""The table of docs/compatibility.md equals the record, and includes both ends of the supported range."""

import csv
import pathlib

import pytest
from scripts import load_script

from transformer_fast._transformers import NEWEST, OLDEST

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.quick
def test_record():
    releases = load_script(ROOT / "tests" / "compat" / "releases.py")
    rows = list(csv.DictReader(releases.RECORD.open()))
    assert "\n" + releases.table(rows) in releases.PAGE.read_text()
    assert all(row["failed"] == "0" and int(row["passed"]) > 100 for row in rows)
    recorded = {tuple(int(part) for part in row["transformers"].split(".")[:2]) for row in rows}
    assert {OLDEST, NEWEST} <= recorded
    assert {release.rpartition(".")[0] for release in releases.DEFAULT} == {
        ".".join(map(str, end)) for end in (OLDEST, NEWEST)
    }
    assert (
        f'"transformers>={OLDEST[0]}.{OLDEST[1]},<{NEWEST[0]}.{NEWEST[1] + 1}"' in (ROOT / "pyproject.toml").read_text()
    )


@pytest.mark.quick
def test_counts():
    releases = load_script(ROOT / "tests" / "compat" / "releases.py")
    log = "..F..s.                    [ 50%]\n.E.    [100%]\n=== FAILURES ===\nE   assert x.y\n.not a report\n"
    assert releases.counts(log) == {"passed": 7, "failed": 2, "skipped": 1}
