"""Fill README's tables from the newest committed results: python benchmarks/tables.py [--check].

Between `<!-- results:NAME -->` and `<!-- /results -->` everything is generated. NAME is DEVICE (all tables of the
newest results whose folder name starts so: "cpu", "cuda") or DEVICE/TABLE with TABLE one of bars, models, generation,
attention, machine.
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys

from transformer_fast.benchmarks import results
from transformer_fast.benchmarks.case import OURS

__all__ = ["TABLES", "fill", "main", "render"]

README = results.HERE.parent / "README.md"
_BLOCK = re.compile(r"(<!-- results:([\w./-]+) -->\n).*?(<!-- /results -->)", re.DOTALL)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tables.py", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where the file is out of date")
    parser.add_argument("--file", type=pathlib.Path, default=README)
    parser.add_argument("--results", type=pathlib.Path, default=results.ROOT)
    args = parser.parse_args(argv)
    before = args.file.read_text()
    after = fill(before, args.results)
    if before == after:
        print(f"{args.file.name} is up to date")
        return 0
    if args.check:
        print(f"{args.file.name} is out of date: run python benchmarks/tables.py", file=sys.stderr)
        return 1
    args.file.write_text(after)
    print(f"{args.file.name} written")
    return 0


def fill(text: str, root: pathlib.Path = results.ROOT) -> str:
    """`text` with every block generated anew."""
    return _BLOCK.sub(lambda block: block[1] + render(block[2], root) + "\n" + block[3], text)


def render(name: str, root: pathlib.Path = results.ROOT) -> str:
    """The Markdown of one block. Raises ValueError for an unknown table."""
    device, _, table = name.partition("/")
    if table and table not in TABLES:
        raise ValueError(f"results:{name}: there is no table {table!r}, only {', '.join(TABLES)}")
    folder = results.newest(device, root, _committed(root))
    if folder is None:
        return f"*No results of a {device} device are committed yet.*"
    rows = results.read(folder)
    about = json.loads((folder / "machine.json").read_text())
    about |= {"ceilings": json.loads((folder / "ceilings.json").read_text()), "folder": folder, "root": root}
    parts = [TABLES[table](rows, about)] if table else [make(rows, about) for make in TABLES.values()]
    return "\n\n".join(part for part in parts if part)


def _committed(root: pathlib.Path) -> set[pathlib.Path] | None:
    """Folders of results that git knows; None outside a repository."""
    done = subprocess.run(["git", "-C", str(root), "ls-files", "."], capture_output=True, text=True)
    if done.returncode != 0:
        return None
    return {(root / line).parent for line in done.stdout.splitlines() if line.endswith("machine.json")}


# ---- the tables --------------------------------------------------------------------------------------
def _machine(rows: list[dict], about: dict) -> str:
    ceilings = about["ceilings"]
    gemm = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in ceilings["gemm"].items() if name != "fp16")
    what = about.get("gpu") or f"{about['cpu']}, {about['threads']} threads, {about['isa']}"
    versions = ", ".join(f"{name} {v}" for name, v in about["versions"].items() if v != "not installed")
    return (
        f"Measured on {what}; matrix multiplication {gemm} GFLOP/s, copy {ceilings['copy'] / 1e9:.0f} GB/s "
        f"(measured beside the cases); {versions}. Commit {about['commit']}"
        f"{', with uncommitted changes' if about['dirty'] else ''}: "
        f"`benchmarks/results/{about['folder'].relative_to(about['root'])}/`."
    )


def _bars(rows: list[dict], about: dict) -> str:
    """Every work that has a bar: what was reached, and whether."""
    lines = _header("work", "against", "bar", "measured", "p20..p80", "met", "peak memory, MB (peer)")
    for row in rows:
        if row["candidate"] != OURS or not row["bar"]:
            continue
        if row["bar"].endswith("more"):
            found = re.search(r"([\d.]+ us) more", row["note"])
            measured, spread = (found[1] if found else "not measured"), ""
        else:
            measured = f"{_ratio(row['ratio_to_peer'])}" if row["ratio_to_peer"] else "not measured"
            spread = f"{_ratio(row['ratio_p20'])}..{_ratio(row['ratio_p80'])}" if row["ratio_p20"] else ""
        lines.append(_row(_work(row), row["peer"], row["bar"], measured, spread, row["met"], _memory(rows, row)))
    return "\n".join(lines) if len(lines) > 2 else ""


def _models(rows: list[dict], about: dict) -> str:
    """Whole models: the peer's time, and the speed-up of every candidate over it."""
    cases = [row for row in rows if row["group"] in ("inference", "training") and row["candidate"] == OURS]
    if not cases:
        return ""
    at = {(row["case"], row["candidate"]): row for row in rows}
    names = list(dict.fromkeys(row["candidate"] for row in rows if row["group"] in ("inference", "training")))
    lines = _header("speed-up over the peer", *(_work(case) for case in cases))
    peers = [at.get((case["case"], case["peer"])) for case in cases]
    lines.append(_row("peer's time", *(f"{_seconds(p['median_s'])} ({p['candidate']})" if p else "" for p in peers)))
    for name in names:
        lines.append(_row(name, *(_speedup(at.get((case["case"], name))) for case in cases)))
    return "\n".join(lines)


def _generation(rows: list[dict], about: dict) -> str:
    """Generated text, a work a row: the peer's time, and the speed-up of every other candidate over it."""
    rows = [row for row in rows if row["group"] == "generation"]
    if not rows:
        return ""
    at = {(row["case"], row["candidate"]): row for row in rows}
    names = list(dict.fromkeys(row["candidate"] for row in rows if row["candidate"] != row["peer"]))
    lines = _header("generation, speed-up over the peer", "peer's time", *names)
    for case in dict.fromkeys(row["case"] for row in rows):
        mine = next(row for row in rows if row["case"] == case)
        peer = at.get((case, mine["peer"]))
        time = f"{_seconds(peer['median_s'])} ({peer['candidate']})" if peer and peer["median_s"] else ""
        lines.append(
            _row(_work(mine).removeprefix("generation: "), time, *(_speedup(at.get((case, name))) for name in names))
        )
    return "\n".join(lines)


def _speedup(row: dict | None) -> str:
    """Of a candidate over its peer, or why there is none."""
    if row is None:
        return ""
    if not row["median_s"] and row["note"]:
        return "not installed" if row["note"].startswith("not installed") else "failed"
    text = _ratio(row["ratio_to_peer"]) if row["ratio_to_peer"] else ""
    return f"**{text}**" if row["candidate"] == OURS and text else text


def _attention(rows: list[dict], about: dict) -> str:
    """Attention rates, GFLOP/s (CPU) or TFLOP/s; causal counts half the FLOPs."""
    rows = [row for row in rows if row["group"].startswith("attention") and row["tflops"]]
    if not rows:
        return ""
    unit, factor = ("TFLOP/s", 1.0) if "gpu" in about else ("GFLOP/s", 1e3)
    names = list(dict.fromkeys(row["candidate"] for row in rows))
    lines = _header(f"attention, {unit}", *names)
    for case in dict.fromkeys(row["case"] for row in rows):
        mine = {row["candidate"]: row for row in rows if row["case"] == case}
        cells = [f"{float(mine[n]['tflops']) * factor:.0f}" if n in mine else "" for n in names]
        lines.append(_row(_work(next(iter(mine.values()))), *cells))
    return "\n".join(lines)


TABLES = {"machine": _machine, "bars": _bars, "models": _models, "generation": _generation, "attention": _attention}


def _header(*cells: str) -> list[str]:
    return [_row(*cells), _row(*("---" for _ in cells))]


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _ratio(text: str) -> str:
    return f"{float(text):.2f}x"


def _seconds(text: str) -> str:
    value = float(text)
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} us"


def _work(row: dict) -> str:
    """'attention forward: fp32 b8 s512 causal' from a case's name."""
    group, what = row["case"].split("/")
    return f"{group.replace('-', ' ')}: {what.replace('-', ' ')}"


def _memory(rows: list[dict], row: dict) -> str:
    if not row["peak_memory_mb"]:
        return ""
    peer = next((r for r in rows if r["case"] == row["case"] and r["candidate"] == row["peer"]), None)
    theirs = f" ({float(peer['peak_memory_mb']):.0f})" if peer and peer["peak_memory_mb"] else ""
    return f"{float(row['peak_memory_mb']):.0f}{theirs}" + (" over" if row["memory_met"] == "no" else "")


if __name__ == "__main__":
    raise SystemExit(main())
