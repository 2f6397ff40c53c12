"""Measure this package against its peers; results, with a picture per group, go to --output."""

import argparse
import fnmatch
import importlib.util
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformer_fast.benchmarks import cases as case_list
from transformer_fast.benchmarks import ceilings as ceiling
from transformer_fast.benchmarks import results
from transformer_fast.benchmarks.attempts import MOST, Attempts
from transformer_fast.benchmarks.case import OURS, Case, Part, Unavailable, missing
from transformer_fast.benchmarks.progress import Progress
from transformer_fast.benchmarks.timing import QUICK, Budget, Timing, interleave, ratios

# The noise of allocator and interpreter in measurements of a process's memory.
MEMORY_NOISE_MB = 1.0
# No downloads, and no loading reports of Hugging Face, which would disturb the progress bar.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}
GPU_LOST, TIME_UP = 3, 4  # exit statuses after which --missing continues
WRONG = "WRONG RESULT"  # begins the note of a candidate of ours, whichever backend it names
# Relative to the largest value: larger than rounding, smaller than any mistake, so that wrong results do not count.
DISAGREEMENT = 0.02


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    args = _parser(prog).parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("there is no NVIDIA GPU here: run with --device cpu", file=sys.stderr)
        return 2
    cases = case_list.select(case_list.all_cases(args.device), args.only)
    if args.list:
        print("\n".join(case.name for case in cases))
        return 0
    if not cases:
        print(f"no case matches {args.only!r}; --list shows their names", file=sys.stderr)
        return 2
    if args.threads:
        torch.set_num_threads(args.threads)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    budget = QUICK if args.quick else Budget()
    about = results.machine(args.device)
    if (about["load_average"] or 0.0) > 0.5 * about["cores"]:
        print(f"this machine is busy (load {about['load_average']:.1f}): times will scatter", file=sys.stderr)
    folder = args.output or results.result_folder(about)
    there = {row["case"] for row in results.read(folder)} if (folder / "results.csv").exists() else set()
    if args.missing:
        cases = [case for case in cases if case.name not in there]
    if args.unmeasured:
        known = set().union(*(_measured(file.parent) for file in folder.parent.glob("*/results.csv")))
        cases = [case for case in cases if case.name not in known]
    rows: list[dict] = []
    end = time.monotonic() + args.seconds if args.seconds else None
    attempts = Attempts(folder / "begun.json", args.case_limit, GPU_LOST)
    without = frozenset(filter(None, (args.without or "").split(",")))
    with Progress(len(cases) + 1) as bar:
        bar.describe("ceilings")
        noted = results.ceilings(folder) if args.missing else None
        top = ceiling.Ceilings(**noted) if noted else ceiling.measure(args.device, budget)
        bar.update()
        for case in cases:
            if end is not None and time.monotonic() > end:
                print(f"no time left: {len(cases) - len({row['case'] for row in rows})} cases were not run")
                return TIME_UP
            bar.describe(case.name)
            if attempts.given_up(case.name):
                note = f"failed: {MOST} times it took over the time limit of a case, or its process crashed"
                # Rows of an earlier run without the slow candidates are better than this one.
                measured = [] if case.name in there else [_row(case, OURS, args.device, note)]
            else:
                attempts.begin(case.name)
                measured = measure(
                    case,
                    args.device,
                    budget,
                    top,
                    candidates=args.candidates,
                    without=without,
                    slow=args.slow or not args.quick,
                    memory=not args.no_memory,
                    progress=bar.detail,
                )
            rows += measured
            results.write(folder, rows, top._asdict(), about)
            attempts.end(case.name)
            for row in measured:
                bar.line(_line(row))
            bar.update()
            if args.device == "cuda" and (reason := _gpu_is_lost()):
                print(f"the GPU is in an error, and a new process has to continue: {reason}", file=sys.stderr)
                return GPU_LOST
    if not args.no_plots:
        _draw(folder)
    print(f"results: {folder}")
    return 0


def _measured(folder: pathlib.Path) -> set[str]:
    """The cases of a results folder of which no candidate failed."""
    rows = results.read(folder)
    return {row["case"] for row in rows} - {row["case"] for row in rows if "failed" in row["note"]}


def _gpu_is_lost() -> str:
    """The error of a synchronisation after a GPU error, which makes the process useless; else ''."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


def _draw(folder: pathlib.Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not installed: no plots; python benchmarks/plot.py FOLDER draws them later")
        return
    from transformer_fast.benchmarks import plot

    plot.draw(folder)


def _peak_memory_mb(work: str, **arguments) -> float:
    from transformer_fast.benchmarks.memory import peak_memory_mb  # needs psutil

    return peak_memory_mb(work, **arguments)


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("--only", metavar="PATTERN", help="cases by name, comma-separated, * and ? allowed")
    parser.add_argument("--candidates", metavar="PATTERN", help="candidates by name; ours and the peer always run")
    parser.add_argument("--without", metavar="NAMES", help="candidates to leave out, by their full names")
    parser.add_argument("--seconds", type=float, help="begin no case when so many seconds are over")
    parser.add_argument(
        "--case-limit", type=float, metavar="SECONDS",
        help=f"a case that takes longer ends the process with status {GPU_LOST}; with --missing it is left out after "
        "the second time, as is a case that crashes the process",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="few rounds; no candidates that take long to prepare")
    parser.add_argument("--slow", action="store_true", help="with --quick: include them")
    parser.add_argument("--missing", action="store_true", help="only cases that are not in the output folder yet")
    parser.add_argument(
        "--unmeasured", action="store_true", help="only cases that no folder beside the output folder has"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--threads", type=int, help="default: torch's choice, the number of cores")
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        help="default: <device>/<date>-<commit> in benchmarks/results of a checkout, or in ./transformer_fast_results",
    )
    parser.add_argument("--no-memory", action="store_true", help="skip peak memory, which needs one process per row")
    parser.add_argument("--no-plots", action="store_true", help="draw no pictures")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    return parser


def measure(
    case: Case,
    device: str,
    budget: Budget,
    top: ceiling.Ceilings,
    *,
    candidates: str | None = None,
    without: frozenset[str] = frozenset(),
    slow: bool = True,
    memory: bool = True,
    progress: Callable[[str], None] = lambda text: None,
    peak: Callable[..., float] = _peak_memory_mb,
    clock: Callable[[Callable[[], object], int], float] | None = None,
) -> list[dict[str, Any]]:
    """The rows of one case, OURS first. The row of a candidate that cannot run has the reason as its note."""
    calls, notes, parts = _prepare(case, device, candidates, without, slow, progress)
    settle = {c.name: c.settle for c in case.candidates if c.name in calls and c.settle}
    try:
        timings = interleave(
            calls,
            device=device,
            budget=budget,
            settle=settle,
            on_sample=lambda name, done: progress(f"{name}, round {done + 1}"),
            clock=clock,
        )
    except RuntimeError as error:  # a GPU is out of memory, or in an error
        timings = {}
        notes = {name: f"{notes.get(name, '')}; not timed: {_first_line(error)}".lstrip("; ") for name in calls}
    del calls
    rows = []
    for candidate in case.candidates:
        name = candidate.name
        if name not in timings and name not in notes:
            continue
        row = _row(case, name, device, notes.get(name, ""))
        if name in timings:
            _fill_times(row, case, parts, timings[name], timings.get(case.peer), top)
        rows.append(row)
    if memory and case.memory:
        _fill_memory(rows, case, device, timings, progress, peak)
    _judge(rows, case, timings)
    return rows


def _row(case: Case, candidate: str, device: str, note: str) -> dict[str, Any]:
    return dict.fromkeys(results.COLUMNS, "") | {
        "case": case.name,
        "group": case.group,
        "candidate": candidate,
        "peer": case.peer,
        "device": device,
        "dtype": case.dtype,
        "threads": torch.get_num_threads(),
        "shape": case.shape,
        "note": note,
    }


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:160]}"


def _prepare(
    case: Case, device: str, chosen: str | None, without: frozenset[str], slow: bool, progress
) -> tuple[dict, dict[str, str], list[Part]]:
    """({candidate: call to time}, {candidate: note}, parts of the work). A note says why a candidate is missing, or its
    difference."""
    calls: dict[str, Callable] = {}
    notes: dict[str, str] = {}
    inputs, expected = case.inputs(False), None
    for candidate in sorted(case.candidates, key=lambda c: c.name != case.peer):
        name = candidate.name
        patterns = [f"*{part}*" for part in chosen.split(",")] if chosen else ["*"]
        if name not in (OURS, case.peer) and not any(fnmatch.fnmatch(name, p) for p in patterns):
            continue
        if candidate.slow and not slow:
            continue
        if name in without:
            notes[name] = "left out: its kernels did not pass a smoke test"
            continue
        absent = missing(candidate, device)
        if absent.startswith("does not run"):
            continue
        if absent:
            notes[name] = absent
            continue
        progress(f"{name}: preparing")
        try:
            call = candidate.prepare(inputs)
            output = call()
        except Unavailable as reason:
            notes[name] = str(reason)
            continue
        except Exception as error:  # the failure of a candidate must not affect the others' results
            notes[name] = f"failed: {_first_line(error)}"
            continue
        calls[name] = call
        if case.result is not None and candidate.comparable:
            result = [t.detach().double() for t in _tensors(case.result(output, inputs))]
            if name == case.peer:
                expected = result
            elif expected is not None and candidate.low_precision:
                notes[name] = f"cosine to {case.peer}: {_cosine(result, expected)}"
            elif expected is not None:
                notes[name] = f"differs from {case.peer} by {_difference(result, expected):.1e} of the largest value"
                if name.split()[0] == OURS and not _difference(result, expected) <= DISAGREEMENT:
                    notes[name] = f"{WRONG}: {notes[name]}"
    return calls, notes, case.parts(inputs) if case.parts else []


def _tensors(value: Any) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else [t for item in value for t in _tensors(item)]


def _cosine(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> str:
    """The cosine of the rows, as text."""
    found = torch.cat(
        [torch.nn.functional.cosine_similarity(a, e, dim=-1).flatten() for a, e in zip(actual, expected, strict=True)]
    )
    return f"mean {found.mean():.5f}, least {found.min():.4f}"


def _difference(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest difference relative to the largest value, over all tensors."""
    return max(
        ((a - e).abs().max() / e.abs().max().clamp_min(1e-30)).item() for a, e in zip(actual, expected, strict=True)
    )


def _fill_times(
    row: dict, case: Case, parts: list[Part], timing: Timing, peer: Timing | None, top: ceiling.Ceilings
) -> None:
    row |= {"median_s": _digits(timing.median), "p20_s": _digits(timing.p20), "p80_s": _digits(timing.p80)}
    if peer is not None:
        ratio = ratios(peer, timing)
        row |= {
            "ratio_to_peer": _digits(ratio.median),
            "ratio_p20": _digits(ratio.p20),
            "ratio_p80": _digits(ratio.p80),
        }
    if case.flops:
        row["tflops"] = _digits(case.flops / timing.median / 1e12)
    if case.bytes:
        row["gbps"] = _digits(case.bytes / timing.median / 1e9)
    if case.flops or case.bytes or parts:
        row["share_of_ceiling"] = _digits(top.seconds(case.flops, case.bytes, case.dtype, parts) / timing.median)


def _fill_memory(rows: list[dict], case: Case, device: str, timings, progress, peak: Callable[..., float]) -> None:
    for row in rows:
        name = row["candidate"]
        if name not in timings or name not in (OURS, case.peer):
            continue
        progress(f"{name}: memory")
        try:
            used = peak(
                "transformer_fast.benchmarks.cases:memory_work",
                name=case.name,
                candidate=name,
                device=device,
                threads=torch.get_num_threads(),
            )
            row["peak_memory_mb"] = f"{used:.1f}"
        except (RuntimeError, OSError, ImportError) as error:
            row["note"] = "; ".join(filter(None, [row["note"], f"memory not measured: {error}"]))


def _judge(rows: list[dict], case: Case, timings: dict[str, Timing]) -> None:
    """Fill bar, met and memory_met of our row."""
    found = {row["candidate"]: row for row in rows}
    ours, peer = found.get(OURS), found.get(case.peer)
    if ours is None:
        return
    remarks = [ours["note"]]
    if ours["peak_memory_mb"] and peer and peer["peak_memory_mb"]:
        within = float(ours["peak_memory_mb"]) <= float(peer["peak_memory_mb"]) + MEMORY_NOISE_MB
        ours["memory_met"] = "yes" if within else "no"
    if case.bar is not None:
        ours["bar"] = str(case.bar)
        met = OURS in timings and case.peer in timings and not ours["note"].startswith(WRONG)
        if met and case.bar.speedup is not None:
            met = float(ours["ratio_to_peer"]) >= case.bar.speedup
        elif met:
            extra = Timing([o - p for o, p in zip(timings[OURS].seconds, timings[case.peer].seconds, strict=True)])
            remarks.append(f"{extra.median * 1e6:.1f} us more than {case.peer}")
            met = extra.median * 1e6 <= case.bar.microseconds
        if case.bar.ceiling is not None:
            met = met and float(ours["share_of_ceiling"]) >= case.bar.ceiling
        for rival in case.bar.ahead_of:
            if OURS in timings and rival in timings:
                lead = ratios(timings[rival], timings[OURS]).median
                remarks.append(f"{lead:.2f}x {rival}")
                met = met and lead >= 1.0
        ours["met"] = "yes" if met else "no"
    ours["note"] = "; ".join(filter(None, remarks))


def _digits(value: float) -> str:
    return f"{value:.4g}"


def _line(row: dict) -> str:
    """The text of one measured row, printed during the run."""
    if not row["median_s"]:
        return f"{row['case']:52s} {row['candidate']:26s} {row['note']}"
    seconds = float(row["median_s"])
    shown = f"{seconds * 1e3:10.3f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:10.2f} us"
    parts = [f"{row['case']:52s} {row['candidate']:26s} {shown}"]
    if row["ratio_to_peer"]:
        parts.append(f"{float(row['ratio_to_peer']):6.2f}x")
    if row["tflops"]:
        parts.append(f"{float(row['tflops']) * 1e3:7.1f} GF/s")
    if row["peak_memory_mb"]:
        parts.append(f"{row['peak_memory_mb']} MB")
    if row["bar"]:
        parts.append(f"[{row['bar']}: {row['met']}; memory {row['memory_met'] or '-'}]")
    return "  ".join([*parts, row["note"]])


if __name__ == "__main__":
    raise SystemExit(main())
