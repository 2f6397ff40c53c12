"""Runs the GPU tests of some groups in several processes, so that a crash affects a single test:

    python benchmarks/flight_tests.py --groups cuda-norm cuda-decode --output FOLDER [--workers 14] [--seconds 60]

Every process takes the next free test, and writes its outcome to disk before the next one. After a timeout, a crash or
a CUDA error, after which the process cannot be used any more, a new process continues with the other tests. A later
call runs the tests that have not passed. FOLDER/<group>.jsonl has the outcomes, FOLDER/<group>.xml the report that
ledger.py reads. Needs only pytest.
"""

import argparse
import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree

OPS = "tests/ops/test_"
GROUPS = {
    "cuda-attention-forward": (f"{OPS}attention_cuda.py", f"{OPS}attention_wgmma_cuda.py"),
    "cuda-attention-backward": (f"{OPS}attention_backward_cuda.py", f"{OPS}attention_backward_wgmma_cuda.py"),
    "cuda-decode": (f"{OPS}attention_decode_cuda.py",),
    "cuda-norm": (f"{OPS}norm_cuda.py",),
    "cuda-rotary": (f"{OPS}rotary.py", f"{OPS}rotary_cache_append.py", f"{OPS}activation_cuda.py"),
    "triton-attention": (f"{OPS}attention_triton.py",),
    "triton-rows": (f"{OPS}any_strides.py", f"{OPS}norm_triton.py", f"{OPS}activation_triton.py",
                    f"{OPS}dropout_triton.py"),
    "graphs": (f"{OPS}cuda_graphs_gpu.py", f"{OPS}attention_memory_gpu.py", f"{OPS}attention_sdpa.py"),
    "models": ("tests/generation/test_graph_step.py", "tests/layers/test_encoder_stack.py"),
}  # fmt: skip
TEST_LIMIT = 60.0  # seconds per test, compilation included
UNKNOWN = 5.0  # seconds that a test may take of which no earlier run is known
RESTARTS = 60
DEAD = 70  # exit status of a process whose GPU context cannot be used any more
STICKY = ("CUDA error", "AcceleratorError", "device-side assert", "illegal memory access", "unspecified launch failure")


def outcomes(report: pathlib.Path) -> dict[str, dict]:
    """{test: its last outcome}. An incomplete line is skipped."""
    found: dict[str, dict] = {}
    try:
        lines = report.read_text(errors="replace").splitlines()
    except OSError:
        return found
    for line in lines:
        try:
            entry = json.loads(line)
            found[entry["id"]] = entry
        except (ValueError, KeyError, TypeError):
            continue
    return found


def durations() -> dict[str, float]:
    """{test: seconds} of earlier runs on a GPU."""
    reports = sorted(pathlib.Path(__file__).parent.glob("results/cuda-*/*/tests/*.jsonl"))
    return {test: entry["seconds"] for report in reports for test, entry in outcomes(report).items()}


def note(report: pathlib.Path, test: str, outcome: str, seconds: float, message: str = "") -> None:
    line = json.dumps({"id": test, "outcome": outcome, "seconds": round(seconds, 2), "message": message[-4000:]})
    with open(report, "ab", buffering=0) as file:
        file.write(f"{line}\n".encode())  # one write, so that lines of several processes do not mix


def write_xml(report: pathlib.Path, files: tuple[str, ...], complete: bool) -> None:
    """Write the outcomes as a JUnit report. An incomplete one has an error in each test file, so that none of it counts
    as verified."""
    suite = ElementTree.Element("testsuite", name=report.stem)
    found = outcomes(report)
    for test, entry in found.items():
        path, _, name = test.partition("::")
        case = ElementTree.SubElement(
            suite, "testcase", classname=_module(path), name=name, file=path, time=str(entry["seconds"])
        )
        if entry["outcome"] != "passed":
            kind = "skipped" if entry["outcome"] == "skipped" else "failure"
            text = _printable(entry["message"])
            ElementTree.SubElement(case, kind, message=text[-300:]).text = text
    for path in files if not complete else ():
        case = ElementTree.SubElement(suite, "testcase", classname=_module(path), name="all tests were run", file=path)
        ElementTree.SubElement(case, "error", message="the run was cut short")
    fresh = report.with_suffix(".xml.new")
    ElementTree.ElementTree(suite).write(fresh, encoding="utf-8", xml_declaration=True)
    os.replace(fresh, report.with_suffix(".xml"))


def _module(path: str) -> str:
    return path.removesuffix(".py").replace("/", ".")


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)


class Reports:
    """Finds the report of a test: that of the group with its file."""

    def __init__(self, folder: pathlib.Path, groups: list[str]):
        self.folder = folder
        self.groups: dict[str, tuple[str, ...]] = {}
        for name in groups:
            name, _, files = name.partition("=")
            self.groups[name] = tuple(files.split(",")) if files else GROUPS[name]
        self.files = [file for files in self.groups.values() for file in files]

    def report(self, group: str) -> pathlib.Path:
        return self.folder / f"{group}.jsonl"

    def of(self, test: str) -> pathlib.Path:
        path = test.partition("::")[0]
        for group, files in self.groups.items():
            if any(path.endswith(pathlib.Path(file).name) for file in files):
                return self.report(group)
        raise ValueError(f"{test}: in none of the groups {', '.join(self.groups)}")

    def outcomes(self) -> dict[str, dict]:
        return {test: entry for group in self.groups for test, entry in outcomes(self.report(group)).items()}


class Worker:
    """A pytest plugin that runs the tests which this process claims first."""

    def __init__(self, reports: Reports, claims: pathlib.Path, current: pathlib.Path):
        self.reports, self.claims, self.current = reports, claims, current
        self.phases: list = []

    def pytest_runtestloop(self, session):
        fresh = self.claims / f"collected-{os.getpid()}"  # all write the same: an incomplete file does no harm
        fresh.write_text(json.dumps([item.nodeid for item in session.items]))
        os.replace(fresh, self.claims / "collected")
        known = durations()  # the longest first, so that none is left alone at the end
        for item in sorted(session.items, key=lambda item: -known.get(item.nodeid, UNKNOWN)):
            if not self._claim(item.nodeid):
                continue
            self.current.write_text(json.dumps([item.nodeid, time.time()]))
            self.phases = []
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
            failed = [phase for phase in self.phases if phase.failed]
            outcome = "failed" if failed else "skipped" if any(p.skipped for p in self.phases) else "passed"
            text = "\n".join(str(phase.longrepr) for phase in self.phases if phase.longrepr)
            note(self.reports.of(item.nodeid), item.nodeid, outcome, sum(phase.duration for phase in self.phases), text)
            self.current.unlink(missing_ok=True)
            if failed and any(words in text for words in STICKY):
                os._exit(DEAD)
        return True

    def pytest_runtest_logreport(self, report):
        self.phases.append(report)

    def _claim(self, test: str) -> bool:
        try:
            os.close(os.open(self.claims / hashlib.sha1(test.encode()).hexdigest(), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True


def work(options) -> int:
    import pytest

    reports = Reports(options.output, options.groups)
    worker = Worker(reports, options.claims, options.claims / f"current-{options.worker}")
    arguments = [*reports.files, "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short", "-m", options.marker]
    return int(pytest.main(arguments, plugins=[worker]))


def lead(options) -> int:
    """Start the workers, and restart them when they end early."""
    end_at = time.monotonic() + options.seconds
    options.output.mkdir(parents=True, exist_ok=True)
    reports, claims = Reports(options.output, options.groups), options.output / "claims"
    shutil.rmtree(claims, ignore_errors=True)
    claims.mkdir()
    passed = [test for test, entry in reports.outcomes().items() if entry["outcome"] in ("passed", "skipped")]
    for test in passed:
        (claims / hashlib.sha1(test.encode()).hexdigest()).touch()
    command = [sys.executable, __file__, "--groups", *options.groups, "--output", options.output, "--claims", claims,
               "--marker", options.marker]  # fmt: skip
    logs = open(options.output / "tests.log", "ab")  # noqa: SIM115

    def start(number: int) -> subprocess.Popen:
        line = [*map(str, command), "--worker", str(number)]
        return subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=logs, stderr=logs, start_new_session=True)

    running = {number: start(number) for number in range(options.workers)}
    started, whole = options.workers, True
    try:
        while running and time.monotonic() < end_at:
            time.sleep(0.05)
            for number, process in list(running.items()):
                status = process.poll()
                test, since = _current(claims / f"current-{number}")
                if status is None and test and time.time() - since > options.test_limit:
                    _kill(process)
                    status, reason = process.wait(), f"took over {options.test_limit:.0f} s"
                elif status is None:
                    continue
                else:
                    reason = f"its process ended with status {status}"
                del running[number]
                if test:
                    (claims / f"current-{number}").unlink(missing_ok=True)
                    if test not in reports.outcomes() or status != DEAD:
                        note(reports.of(test), test, "failed", time.time() - since, reason)
                ended = status in (0, 5) or (status == 1 and not test)  # pytest's: passed, no tests, some failed
                if ended:
                    continue
                if started < RESTARTS:
                    running[started] = start(started)
                    started += 1
                else:
                    whole = False
    finally:
        whole = whole and not running
        for process in running.values():
            _kill(process)
        logs.close()
    collected, failed = _collected(claims), 0
    for group, files in reports.groups.items():
        report = reports.report(group)
        found = outcomes(report)
        wanted = [test for test in collected or () if reports.of(test) == report]
        complete = collected is not None and all(test in found for test in wanted)
        write_xml(report, files, complete)
        counts = {what: sum(e["outcome"] == what for e in found.values()) for what in ("passed", "failed", "skipped")}
        print(f"{group}: {counts}" + ("" if complete else ", not all were run"))
        failed += counts["failed"]
        whole = whole and complete and counts["passed"] > 0  # all skipped: this is another GPU than they are for
        for test, entry in found.items():
            if entry["outcome"] == "failed":
                print(f"FAILED {test}: {entry['message'].strip().splitlines()[-1:]}")
    shutil.rmtree(claims, ignore_errors=True)
    return int(failed > 0 or not whole)


def _current(file: pathlib.Path) -> tuple[str, float]:
    try:
        test, since = json.loads(file.read_text())
        return test, since
    except (OSError, ValueError):
        return "", 0.0


def _collected(claims: pathlib.Path) -> list[str] | None:
    try:
        return json.loads((claims / "collected").read_text())
    except (OSError, ValueError):
        return None


def _kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", nargs="+", required=True, metavar="NAME", help="or NAME=FILE,FILE")
    parser.add_argument("--marker", default="gpu")
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--workers", type=int, default=max(1, min(14, (os.cpu_count() or 2) - 2)))
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--test-limit", type=float, default=TEST_LIMIT)
    parser.add_argument("--worker", type=int)
    parser.add_argument("--claims", type=pathlib.Path)
    options = parser.parse_args()
    return lead(options) if options.worker is None else work(options)


if __name__ == "__main__":
    raise SystemExit(main())
