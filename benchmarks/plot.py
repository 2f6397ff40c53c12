"""Plots of a results folder: python benchmarks/plot.py FOLDER."""

import pathlib
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from transformer_fast.benchmarks import results
from transformer_fast.benchmarks.case import OURS

__all__ = ["attention_rates", "draw", "speedups"]

OURS_COLOURS = {OURS: "#c0392b", f"{OURS} cuda": "#e67e22"}
PEER_COLOURS = ["#34495e", "#7f8c8d", "#2980b9", "#27ae60", "#8e44ad", "#16a085", "#b7950b"]


def draw(folder: pathlib.Path) -> list[pathlib.Path]:
    """Write every plot that the rows of `folder` allow, as PNG into the same folder. A GPU's runs have a part of the
    cases each, so the folders beside it give the others."""
    found = results.of_all_runs(folder) if folder.parent.name.startswith("cuda") else results.read(folder)
    rows = [row for row in found if row["median_s"]]
    written = []
    for group in dict.fromkeys(row["group"] for row in rows if row["group"] != "overhead"):
        written.append(speedups([row for row in rows if row["group"] == group], group, folder))
    rates = [row for row in rows if row["group"].startswith("attention-") and row["tflops"]]
    for group in dict.fromkeys(row["group"] for row in rates):
        written.append(attention_rates([row for row in rates if row["group"] == group], group, folder))
    return written


def _colour(name: str, names: list[str]) -> str:
    if name in OURS_COLOURS:
        return OURS_COLOURS[name]
    return PEER_COLOURS[[n for n in names if n not in OURS_COLOURS].index(name) % len(PEER_COLOURS)]


def speedups(rows: list[dict], group: str, folder: pathlib.Path) -> pathlib.Path:
    """Bars: speed-up over the peer, whiskers p20 to p80, the bar to reach as a tick."""
    rows = [row for row in rows if row["ratio_to_peer"]]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    names = list(dict.fromkeys(row["candidate"] for row in rows))
    height = 0.8 / max(1, len(names))
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.28 * len(rows)), layout="constrained")
    for i, name in enumerate(names):
        mine = [row for row in rows if row["candidate"] == name]
        at = [cases.index(row["case"]) + (i - (len(names) - 1) / 2) * height for row in mine]
        value, low, high = ([float(row[key]) for row in mine] for key in ("ratio_to_peer", "ratio_p20", "ratio_p80"))
        spread = [[max(0.0, v - lo) for v, lo in zip(value, low)], [max(0.0, hi - v) for v, hi in zip(value, high)]]
        axes.barh(at, value, height, label=name, color=_colour(name, names), xerr=spread, error_kw={"lw": 0.8})
        for row, y in zip(mine, at):
            if row["bar"].startswith(">= "):
                target = float(row["bar"][3:].split("x")[0])
                axes.plot([target, target], [y - height / 2, y + height / 2], color="black", lw=2)
    axes.axvline(1.0, color="black", lw=0.6)
    axes.set_yticks(range(len(cases)), [case.split("/")[1] for case in cases])
    axes.invert_yaxis()
    axes.set_xlabel(f"speed-up over {', '.join(dict.fromkeys(row['peer'] for row in rows))} (black tick: the bar)")
    axes.set_title(group)
    axes.legend(fontsize="small")
    return _save(figure, folder / f"speedup-{group}.png")


def attention_rates(rows: list[dict], group: str, folder: pathlib.Path) -> pathlib.Path:
    """Lines: FLOP rate over sequence length, one panel per dtype, head dim and feature."""
    unit, factor = ("TFLOP/s", 1.0) if rows[0]["device"] == "cuda" else ("GFLOP/s", 1e3)
    panels: dict[str, list[dict]] = {}
    for row in rows:
        panels.setdefault(_panel(row), []).append(row)
    names = list(dict.fromkeys(row["candidate"] for row in rows))
    figure, grid = plt.subplots(
        1, len(panels), figsize=(3.2 * len(panels) + 1, 3.4), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, (title, mine) in zip(grid[0], panels.items()):
        for name in names:
            points = sorted((_shape(row)[2], float(row["tflops"]) * factor) for row in mine if row["candidate"] == name)
            axes.plot(*zip(*points), "o-", label=name, color=_colour(name, names)) if points else None
        lengths = sorted({_shape(row)[2] for row in mine})
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [str(n) for n in lengths])
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("sequence length")
        axes.grid(alpha=0.3)
    grid[0][0].set_ylim(bottom=0)  # of all panels: it ends their automatic scaling, so it comes last
    grid[0][0].set_ylabel(f"{unit} (causal counts half)")
    grid[0][-1].legend(fontsize="small")
    return _save(figure, folder / f"rate-{group}.png")


def _shape(row: dict) -> tuple[int, ...]:
    return tuple(int(n) for n in row["shape"].strip("()").split(","))


def _panel(row: dict) -> str:
    feature = row["case"].split(f"s{_shape(row)[2]}")[1].lstrip("-").removeprefix(f"d{_shape(row)[3]}").lstrip("-")
    return f"{row['dtype']}, D {_shape(row)[3]}, {feature or 'plain'}"


def _save(figure, path: pathlib.Path) -> pathlib.Path:
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


if __name__ == "__main__":
    for plot in draw(pathlib.Path(sys.argv[1])):
        print(plot)
