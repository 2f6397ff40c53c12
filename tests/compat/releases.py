"""Runs tests/compat under other releases of transformers, each in its own folder: python tests/compat/releases.py

Without arguments, the oldest and the newest supported release; the pinned one runs with all other tests. Folders are
kept in .cache, so another run installs nothing. --record adds the results to benchmarks/results/compatibility.csv and
to the table in docs/compatibility.md.
"""

import argparse
import csv
import datetime
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
RECORD = ROOT / "benchmarks" / "results" / "compatibility.csv"
PAGE = ROOT / "docs" / "compatibility.md"
TESTS = ("tests/compat", "tests/models/test_forward_contract.py")
_HTTPX = ("httpx==0.28.1", "httpcore==1.0.9", "certifi==2026.10.19.post1")
# Dependencies of a release that the environment of the pinned release lacks or has in another version.
NEEDS = {"5.17.0": ("huggingface-hub==1.33.0", *_HTTPX), "5.20.0": _HTTPX}
DEFAULT = ("5.17.0", "5.24.0")
FIELDS = ("transformers", "torch", "python", "passed", "failed", "skipped", "date", "commit")


def folder_of(release: str) -> pathlib.Path:
    """The folder of a release, which is installed if necessary."""
    folder = ROOT / ".cache" / f"transformers-{release}"
    if not folder.is_dir():
        part = folder.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        packages = [f"transformers=={release}", *NEEDS.get(release, ())]
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(part), *packages]
        subprocess.run(install, check=True)
        part.rename(folder)
    return folder


def start(release: str, options: list[str]) -> tuple[subprocess.Popen, pathlib.Path]:
    paths = [str(folder_of(release)), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths), "TRANSFORMER_FAST_TEST_RELEASE": release, "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    log = ROOT / ".cache" / f"transformers-{release}.log"
    command = [sys.executable, "-m", "pytest", *TESTS, "-n", "0", "-q", *options]
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
    return process, log


def counts(log: str) -> dict[str, int]:
    """How many tests passed, failed and were skipped, from pytest's output."""
    found = dict.fromkeys(("passed", "failed", "skipped"), 0)
    for line in re.findall(r"^([.FEsx]+)(?: +\[ *\d+%\])?$", log, flags=re.M):
        found["passed"] += line.count(".")
        found["failed"] += line.count("F") + line.count("E")
        found["skipped"] += line.count("s") + line.count("x")
    return found


def record(release: str, found: dict[str, int]) -> None:
    import torch

    commit = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    row = {
        "transformers": release, "torch": torch.__version__, "python": platform.python_version(), **found,
        "date": datetime.date.today().isoformat(), "commit": commit.stdout.strip(),
    }  # fmt: skip
    rows = list(csv.DictReader(RECORD.open())) if RECORD.is_file() else []
    key = ("transformers", "torch", "python")
    rows = [old for old in rows if any(old[k] != row[k] for k in key)] + [row]
    with RECORD.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda r: [r[k] for k in key]))


def table(rows: list[dict]) -> str:
    """The record as the table of docs/compatibility.md."""
    lines = ["| " + " | ".join(FIELDS) + " |", "|" + " --- |" * len(FIELDS)]
    return "\n".join([*lines, *("| " + " | ".join(row[k] for k in FIELDS) + " |" for row in rows)]) + "\n"


def fill_page() -> None:
    rows = list(csv.DictReader(RECORD.open()))
    text = re.sub(
        r"(?<=<!-- compatibility -->\n).*?(?=<!-- /compatibility -->)", lambda _: "\n" + table(rows) + "\n",
        PAGE.read_text(), flags=re.S,
    )  # fmt: skip
    PAGE.write_text(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("releases", nargs="*", default=DEFAULT, help="such as 5.20.0")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--option", action="append", default=[], help="handed to pytest")
    arguments = parser.parse_args()
    for release in arguments.releases:  # one after the other: pip cannot run in parallel
        folder_of(release)
    began, running = time.monotonic(), {r: start(r, arguments.option) for r in arguments.releases}
    failed = False
    for release, (process, log) in running.items():
        code = process.wait()
        text = log.read_text()
        found = counts(text)
        said = ", ".join(f"{n} {name}" for name, n in found.items() if n)
        print(f"transformers {release}: {said or 'no test ran'} ({time.monotonic() - began:.0f} s)", flush=True)
        if code:
            failed = True
            print(text)
        elif arguments.record:
            record(release, found)
    if arguments.record and RECORD.is_file():
        fill_page()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
