"""Fill the tables of README, docs/performance.md, docs/doors.md and docs/gpu.md from the newest committed results:
python benchmarks/tables.py [--check].

Text between `<!-- results:NAME -->` and `<!-- /results -->` is generated. NAME is DEVICE (all tables but headline, gpu
and doors, from the newest results whose folder name begins with "cpu" or "cuda") or DEVICE/TABLE with TABLE one of
headline, gpu, bars, models, doors, generation, attention, ops, machine. A GPU is lent for minutes, so its runs have a
part of the cases each: a case comes from the newest folder of that GPU which has it, and names the commit if that is
not the newest.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys

from transformer_fast.benchmarks import results
from transformer_fast.benchmarks.case import OURS

__all__ = ["PAGES", "TABLES", "fill", "main", "render"]

PAGES = [results.HERE.parent / name for name in ("README.md", "docs/performance.md", "docs/doors.md", "docs/gpu.md")]
# Links to the results folders of the tables, for their pictures.
PLOTS = {device: results.HERE.parent / "docs" / "images" / device for device in ("cpu", "cuda")}
_BLOCK = re.compile(r"(<!-- results:([\w./-]+) -->\n).*?(<!-- /results -->)", re.DOTALL)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tables.py", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where the file is out of date")
    parser.add_argument("--file", type=pathlib.Path, nargs="+", default=PAGES)
    parser.add_argument("--results", type=pathlib.Path, default=results.ROOT)
    args = parser.parse_args(argv)
    stale = False
    for file in args.file:
        before = file.read_text()
        after = fill(before, args.results)
        if before == after:
            print(f"{file.name} is up to date")
        elif args.check:
            print(f"{file.name} is out of date: run python benchmarks/tables.py", file=sys.stderr)
            stale = True
        else:
            file.write_text(after)
            print(f"{file.name} written")
    if args.file == PAGES:
        for device, link in PLOTS.items():
            stale |= link.parent.exists() and _link_plots(device, link, args.results, args.check)
    return int(stale)


def _link_plots(device: str, link: pathlib.Path, root: pathlib.Path, check: bool) -> bool:
    """Link the docs' pictures to the newest results folder that has some. With `check`: return whether they are of
    another folder."""
    committed = _committed(root)
    drawn = {path.parent for path in root.glob("*/*/*.png") if committed is None or path.parent in committed}
    newest = results.newest(device, root, drawn)
    if newest is None or link.resolve() == newest.resolve():
        return False
    if check:
        print(f"the pictures in {link.name} are out of date: run python benchmarks/tables.py", file=sys.stderr)
        return True
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(newest, link.parent))
    print(f"{link.name} -> {newest}")
    return False


def fill(text: str, root: pathlib.Path = results.ROOT) -> str:
    """`text` with every block regenerated."""
    return _BLOCK.sub(lambda block: block[1] + render(block[2], root) + "\n" + block[3], text)


def render(name: str, root: pathlib.Path = results.ROOT) -> str:
    """The Markdown of one block. Raises ValueError for an unknown table."""
    device, _, table = name.partition("/")
    if table and table not in TABLES:
        raise ValueError(f"results:{name}: there is no table {table!r}, only {', '.join(TABLES)}")
    folder = results.newest(device, root, _committed(root))
    if folder is None:
        return f"*No results of a {device} device are committed yet.*"
    about = json.loads((folder / "machine.json").read_text())
    rows = results.of_all_runs(folder, _committed(root)) if "gpu" in about else results.read(folder)
    about |= {"ceilings": json.loads((folder / "ceilings.json").read_text()), "folder": folder, "root": root}
    if table:
        return TABLES[table](rows, about)
    parts = {name: make(rows, about) for name, make in TABLES.items() if name not in ("headline", "gpu", "doors")}
    return "\n\n".join(f"{_HEADINGS.get(name, '')}{part}" for name, part in parts.items() if part)


def _committed(root: pathlib.Path) -> set[pathlib.Path] | None:
    """The results folders that are tracked by git; None outside a repository."""
    done = subprocess.run(["git", "-C", str(root), "ls-files", "."], capture_output=True, text=True)
    if done.returncode != 0:
        return None
    return {(root / line).parent for line in done.stdout.splitlines() if line.endswith("machine.json")}


# ---- the tables --------------------------------------------------------------------------------------
def _machine(rows: list[dict], about: dict) -> str:
    ceilings = about["ceilings"]
    unit, factor = ("TFLOP/s", 1e12) if "gpu" in about else ("GFLOP/s", 1e9)
    gemm = ", ".join(f"{name} {rate / factor:.0f}" for name, rate in ceilings["gemm"].items() if name != "fp16")
    what = about.get("gpu") or f"{about['cpu']}, {about['threads']} threads, {about['isa']}"
    versions = ", ".join(f"{name} {v}" for name, v in about["versions"].items() if v != "not installed")
    return (
        f"Measured on {what}; matrix multiplication {gemm} {unit}, copy {ceilings['copy'] / 1e9:.0f} GB/s "
        f"(measured beside the cases); {versions}. Commit {about['commit']}"
        f"{', with uncommitted changes' if about['dirty'] else ''}: "
        f"`benchmarks/results/{about['folder'].relative_to(about['root'])}/`."
    )


# Cases of the front page, with their titles.
HEADLINE = {
    "inference/minilm-real-sentences": "embed real sentences, MiniLM, fp32",
    "int8/minilm-as-they-come": "the same in int8",
    "inference/bert-base-ragged-32": "classify 32 texts of mixed length, BERT base, fp32",
    "int8/bert-base-ragged-32": "the same in int8",
    "training/bert-base-ragged-16x128": "one step of fine-tuning BERT base, fp32",
    "training/smollm-135m-packed-16": "the same of a decoder of 135M, texts packed into one row",
    "generation/gpt2-b1": "write one text, GPT-2, greedy, fp32",
    "generation/gpt2-b1-int8": "the same in int8",
    "generation/marian-beam4-b8": "translate 8 sentences, Marian, 4 beams, fp32",
}


def _headline(rows: list[dict], about: dict) -> str:
    """A few cases: Hugging Face's time, ours, the speed-up, and the fastest other tool of the same run."""
    lines = _header("work", "Hugging Face", "transformer_fast", "speed-up", "fastest other tool in that run")
    for case, words in HEADLINE.items():
        mine = {row["candidate"]: row for row in rows if row["case"] == case and row["median_s"]}
        if OURS not in mine or mine[OURS]["peer"] not in mine:
            continue
        ours, peer = mine[OURS], mine[mine[OURS]["peer"]]
        others = [r for name, r in mine.items() if not name.startswith((OURS, "HF")) and r["ratio_to_peer"]]
        best = max(others, key=lambda row: float(row["ratio_to_peer"]), default=None)
        other = f"{best['candidate']} {_ratio(best['ratio_to_peer'])}" if best else ""
        times = (_seconds(peer["median_s"]), _seconds(ours["median_s"]))
        lines.append(_row(words, *times, f"**{_ratio(ours['ratio_to_peer'])}**", other))
    return "\n".join(lines)


# The same of a GPU.
HEADLINE_GPU = {
    "attention-forward/bf16-b1-s16384-d128-causal": "causal attention, 16384 tokens, head dim 128",
    "attention-backward/bf16-b1-s16384-d128-causal": "its gradients",
    "attention-padded/bf16-b64-s256": "attention, 64 sequences of up to 256 tokens, 40% real",
    "t5-bias-forward/bf16-b8-s2048": "attention with T5's bias, 8 x 2048 tokens",
    "decode/bf16-b8-s1024": "attention of a decoding step, 8 sequences, 1024 tokens cached",
    "inference/bert-base-bf16-ragged-256": "classify 256 texts of mixed length, BERT base",
    "training/bert-base-bf16-ragged-64x128": "one step of fine-tuning BERT base, 64 texts",
    "generation/gpt2-b1-bf16": "write one text, GPT-2, greedy",
}
OURS_CUDA = f"{OURS} cuda"  # the CUDA C++ kernels, by request


def _gpu(rows: list[dict], about: dict) -> str:
    """A few cases: the peer's time, and the speed-up over it of our kernels and of the fastest other tool."""
    lines = _header("work, bfloat16", "peer", "transformer_fast as it chose", "its CUDA C++ kernels", "fastest other")
    for case, words in HEADLINE_GPU.items():
        mine = {row["candidate"]: row for row in rows if row["case"] == case and row["median_s"]}
        peer = mine.get(next((row["peer"] for row in mine.values()), ""))
        if OURS not in mine or peer is None:
            continue
        others = [r for name, r in mine.items() if not name.startswith(OURS) and r is not peer and r["ratio_to_peer"]]
        best = max(others, key=lambda row: float(row["ratio_to_peer"]), default=None)
        other = f"{best['candidate']} {_ratio(best['ratio_to_peer'])}" if best else ""
        time = f"{peer['candidate']}, {_seconds(peer['median_s'])}"
        lines.append(_row(words + _commit(peer), time, _speedup(mine[OURS]), _speedup(mine.get(OURS_CUDA)), other))
    return "\n".join(lines) if len(lines) > 2 else ""


def _ops(rows: list[dict], about: dict) -> str:
    """Operations on a GPU: a table per group."""
    groups = dict.fromkeys(row["group"] for row in rows) if "gpu" in about else {}
    apart = ("inference", "int8", "training", "generation", "attention-forward", "attention-backward")
    return "\n\n".join(filter(None, (_speedups(rows, group) for group in groups if group not in apart)))


def _bars(rows: list[dict], about: dict) -> str:
    """All cases with a bar: the result, and whether the bar was reached."""
    lines = _header("work", "against", "goal", "measured", "p20..p80", "met", "peak memory, MB (peer)")
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
    """Whole models: a table per kind of work."""
    return "\n\n".join(filter(None, (_speedups(rows, group) for group in ("inference", "int8", "training"))))


def _speedups(rows: list[dict], group: str) -> str:
    """One row per case: its size, the peer's time, and the speed-up of every other candidate over it."""
    rows = [row for row in rows if row["group"] == group]
    if not rows:
        return ""
    at = {(row["case"], row["candidate"]): row for row in rows}
    names = list(dict.fromkeys(row["candidate"] for row in rows if row["candidate"] != row["peer"]))
    lines = _header(f"{group}, speed-up over the peer", "size", "peer's time", *names)
    for case in dict.fromkeys(row["case"] for row in rows):
        mine = next(row for row in rows if row["case"] == case)
        peer = at.get((case, mine["peer"]))
        time = f"{_seconds(peer['median_s'])} ({peer['candidate']})" if peer and peer["median_s"] else ""
        work = _work(mine).partition(": ")[2]
        lines.append(_row(work, mine["shape"], time, *(_speedup(at.get((case, name))) for name in names)))
    return "\n".join(lines)


# Column of the table of doors -> the candidate that goes through it.
DOORS = {"import": OURS, "accelerate": "HF with accelerate()", "attn_implementation": "HF with attn_implementation"}


def _doors(rows: list[dict], about: dict) -> str:
    """One row per model and task: the speed-up over the peer through each door. Empty where it was not measured."""
    at = {(row["case"], row["candidate"]): row for row in rows}
    lines = _header("work", "peer", *DOORS)
    for row in rows:
        if row["candidate"] != OURS or row["group"] not in ("inference", "training", "generation"):
            continue
        doors = {door: at.get((row["case"], name)) for door, name in DOORS.items()}
        if any(doors[door] for door in ("accelerate", "attn_implementation")):
            lines.append(_row(_work(row), row["peer"], *(_speedup(found) for found in doors.values())))
    return "\n".join(lines) if len(lines) > 2 else ""


def _generation(rows: list[dict], about: dict) -> str:
    return _speedups(rows, "generation")


def _speedup(row: dict | None) -> str:
    """The speed-up of a candidate over its peer, or why there is none."""
    if row is None:
        return ""
    if not row["median_s"] and row["note"]:
        reasons = {"not installed": "not installed", "has no attention interface": "no interface"}
        return next((short for text, short in reasons.items() if text in row["note"]), "failed")
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


TABLES = {
    "headline": _headline,
    "machine": _machine,
    "bars": _bars,
    "models": _models,
    "doors": _doors,
    "generation": _generation,
    "attention": _attention,
    "ops": _ops,
    "gpu": _gpu,
}
_HEADINGS = {
    "bars": "### Goals\n\n",
    "models": "### Whole models\n\n",
    "generation": "### Generation\n\n",
    "attention": "### Attention\n\n",
    "ops": "### Operations\n\n",
}


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
    return f"{group.replace('-', ' ')}: {what.replace('-', ' ')}{_commit(row)}"


def _commit(row: dict) -> str:
    return f" (at {row['commit']})" if row.get("commit") else ""


def _memory(rows: list[dict], row: dict) -> str:
    if not row["peak_memory_mb"]:
        return ""
    peer = next((r for r in rows if r["case"] == row["case"] and r["candidate"] == row["peer"]), None)
    theirs = f" ({float(peer['peak_memory_mb']):.0f})" if peer and peer["peak_memory_mb"] else ""
    return f"{float(row['peak_memory_mb']):.0f}{theirs}" + (" over" if row["memory_met"] == "no" else "")


if __name__ == "__main__":
    raise SystemExit(main())
