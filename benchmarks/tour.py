"""Run the code of docs/tour.md with one thread: its pictures go to docs/images/tour, the processor time of each section
to benchmarks/results/tour.

    python benchmarks/tour.py
"""

import csv
import datetime
import os
import pathlib
import re
import subprocess
import tempfile
import time

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "tour.md"


def stations(text: str) -> list[tuple[str, str]]:
    """(heading, code) of each section; the code before the first heading is "imports"."""
    parts = re.split(r"^## (.*)$", text, flags=re.M)
    pairs = [("imports", parts[0]), *zip(parts[1::2], parts[2::2])]
    found = [(name, "\n".join(re.findall(r"^```python\n(.*?)^```$", part, re.M | re.S))) for name, part in pairs]
    return [(name, code) for name, code in found if code]


def processor() -> str:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))


def main() -> None:
    torch.set_num_threads(1)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    rows, scope, pictures = [], {"__name__": "__main__"}, ROOT / "docs" / "images" / "tour"
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for name, code in stations(PAGE.read_text(encoding="utf-8")):
            start = time.process_time()
            exec(compile(code, name, "exec"), scope)
            rows.append([name, f"{time.process_time() - start:.1f}", f"{processor()}, one thread", commit.strip()])
            print(f"{rows[-1][1]:>6} s  {name}")
        pictures.mkdir(parents=True, exist_ok=True)
        for file in sorted(pathlib.Path(folder).glob("tour_*.png")):
            if file.name != "tour_attention.png":  # the page shows the demo's picture
                (pictures / file.name).write_bytes(file.read_bytes())
        os.chdir(ROOT)
    output = ROOT / "benchmarks" / "results" / "tour" / f"{datetime.date.today()}-{commit.strip()}.csv"
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", newline="") as file:
        csv.writer(file).writerows([["station", "cpu_seconds", "machine", "commit"], *rows])


if __name__ == "__main__":
    main()
