"""The steps of benchmarks/gpu.sh without a GPU: a stand-in for Python records what it is asked to run."""

import fnmatch
import io
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
import xml.etree.ElementTree

import pytest
from scripts import load_script

pytestmark = pytest.mark.quick
ROOT = pathlib.Path(__file__).resolve().parent.parent
STANDIN = """\
#!{python} -S
import json, os, sys, time
script, arguments = os.path.basename(sys.argv[1]), sys.argv[2:]
flight = os.getppid()  # before the record, which the test may answer by killing the flight
def after(flag):
    return arguments[arguments.index(flag) + 1]
with open({record!r}, "a") as record:
    record.write(json.dumps([script, *arguments]) + "\\n")
print("this is", script, "with ptxas", os.environ.get("TRITON_PTXAS_PATH"))
if script == "smoke.py":
    failing = os.environ.get("FAILING", "").split(",")
    with open(after("--output"), "w") as file:
        json.dump({{name: {{"passed": name not in failing}} for name in {smokes!r}}}, file)
if script == "run.py":
    os.makedirs(after("--output"), exist_ok=True)
    with open(os.path.join(after("--output"), "results.csv"), "a") as file:
        file.write(after("--only") + "\\n")
time.sleep(float(os.environ.get("STEP_SECONDS", "0")))
with open({record!r}) as record:
    hangs = len(record.readlines()) == int(os.environ.get("HANG_AT", "0"))
while hangs and os.getppid() == flight:
    time.sleep(0.02)
sys.exit(int(os.environ.get("FAIL_" + script.split(".")[0].upper(), "0")))
"""


flight, flight_tests, smoke = (
    load_script(ROOT / "benchmarks" / f"{name}.py") for name in ("flight", "flight_tests", "smoke")
)


class Flight:
    def __init__(self, folder: pathlib.Path):
        self.state, self.out, self.record = folder / "state", folder / "out", folder / "record"
        self.results = folder / "results"
        self.state.mkdir()
        self.out.mkdir()
        (self.state / "folder").write_text(str(self.results))
        python = folder / "python"
        smokes = list(smoke.CASES)
        python.write_text(STANDIN.format(python=sys.executable, record=str(self.record), smokes=smokes))
        python.chmod(0o755)
        self.environment = {
            **os.environ, "FLIGHT_STATE": str(self.state), "FLIGHT_PYTHON": str(python), "OUT": str(self.out),
            "PYTHON": sys.executable, "FLIGHT_KIT": str(folder / "kit"),
        }  # fmt: skip

    def start(self, call, *arguments, **environment):
        command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), call, *arguments]
        return subprocess.Popen(
            command, env=self.environment | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip

    def fly(self, call, *arguments, **environment) -> tuple[int, str]:
        process = self.start(call, *arguments, **environment)
        output, _ = process.communicate(timeout=500)
        return process.returncode, output

    def asked(self) -> list[list[str]]:
        return [json.loads(line) for line in self.record.read_text().splitlines()] if self.record.exists() else []

    def packed(self) -> list[str]:
        with tarfile.open(self.out / "flight.tar.gz") as tar:
            return [pathlib.Path(name).name for name in tar.getnames()]


@pytest.fixture
def device(tmp_path):
    return Flight(tmp_path)


def test_steps_run_in_order_and_the_second_call_goes_on(device):
    status, output = device.fly("first", FAIL_RUN="4")
    first = [" ".join(line) for line in device.asked()]
    assert status == 1 and "exit 4" in output
    order = ["flight.py build", "smoke.py", "--groups cuda-", "ledger.py", "attention-forward/", "attention-backward/",
             "decode/"]  # fmt: skip
    assert len(first) == len(order) and all(part in line for part, line in zip(order, first)), first
    assert {"state.json", "smoke.json", "results.csv", "tests-all.log"} <= set(device.packed())
    device.record.unlink()
    status, _ = device.fly("third")
    third = [" ".join(line) for line in device.asked()]
    assert status == 0
    assert not any("smoke.py" in line or "--groups cuda-" in line for line in third), "what was done is not run again"
    assert [line.split()[0] for line in third[:2]] == ["run.py", "run.py"] and "bert-base" in third[0]
    assert any("memcheck" in line for line in third) and sum("--slow" in line for line in third) == 1
    device.record.unlink()
    assert device.fly("tune")[0] == 0 and device.asked()[0][0] == "tune.py"


def _kit_of_kernels(archive: pathlib.Path) -> None:
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        for name in ("KEY/_a_kernel.json", "KEY/_a_kernel.cubin"):
            entry = tarfile.TarInfo(name)
            entry.size = len(name)
            tar.addfile(entry, io.BytesIO(name.encode()))


def test_the_kit_s_kernels_are_in_triton_s_cache(device, tmp_path):
    _kit_of_kernels(tmp_path / "kit" / flight.KERNELS)
    # Another ptxas would change the keys of the cache.
    status, output = device.fly("first", TRITON_PTXAS_PATH="/usr/local/cuda/bin/ptxas")
    assert status == 0 and "1 were in the cache, 0 were compiled here" in output
    assert flight.kernels(device.state / "triton-cache") == {"KEY"}
    assert "with ptxas None" in (device.state / "logs" / "smoke.log").read_text()
    assert "triton-kernels-first.json" in device.packed() and "_a_kernel.cubin" not in device.packed()


def test_another_commit_begins_anew(device, tmp_path):
    (tmp_path / "kit").mkdir()
    for commit, steps in (("one", 7), ("one", 1), ("two", 7)):
        (tmp_path / "kit" / "commit").write_text(f"{commit}\n")
        device.record.unlink(missing_ok=True)
        device.fly("first")
        assert len(device.asked()) == steps, commit  # the ledger is written in every call
        (device.state / "folder").write_text(str(device.results))


def test_a_broken_kit_costs_itself_alone(device, tmp_path):
    archive = tmp_path / "kit" / flight.KERNELS
    _kit_of_kernels(archive)
    archive.write_bytes(archive.read_bytes()[:60])
    status, output = device.fly("first")
    assert status == 0 and "was not unpacked" in output and len(device.asked()) == 7


def test_a_stage_whose_smoke_fails_is_left_out(device):
    status, output = device.fly("first", FAILING="cuda-norm,cuda-backward-wgmma", FAIL_SMOKE="1")
    asked = [" ".join(line) for line in device.asked()]
    tests = next(line for line in asked if "--groups cuda-" in line)
    assert "cuda-attention-forward cuda-decode cuda-rotary" in tests and "cuda-norm" not in tests
    without = [line.split("--only ")[1][:10] for line in asked if "--without transformer_fast cuda" in line]
    assert without == ["attention-", "attention-", "decode/*,h"]
    assert tests.endswith("triton-attention triton-rows graphs models") and status == 1
    device.record.unlink()
    _, output = device.fly("tune", FAILING="")
    assert device.asked() and "left out" not in output


def test_nothing_is_begun_without_time_for_it(device):
    status, output = device.fly("first", "--seconds", "6", STEP_SECONDS="1.2")
    assert status == 1 and "no time left" in output and len(device.asked()) < 6
    assert "state.json" in device.packed()


@pytest.mark.parametrize("status", [flight.GPU_LOST, -signal.SIGKILL])
def test_a_benchmark_that_is_lost_goes_on_in_a_new_process(device, tmp_path, monkeypatch, status):
    statuses, limits = [status, status, 0], []
    monkeypatch.setattr(flight, "STATE", tmp_path)
    monkeypatch.setattr(flight, "run", lambda step, limit, *_: limits.append(limit) or statuses.pop(0))
    assert flight.fly("first", [flight.Step("bench", 60, ("run.py",))], [], tmp_path / "flight.tar.gz", "python") == 0
    assert len(limits) == 3 and not statuses and limits == sorted(limits, reverse=True)


@pytest.mark.parametrize("begun", [2, 4])
def test_what_was_done_before_a_kill_is_kept(device, begun):
    process = device.start("first", HANG_AT=str(begun))
    deadline = time.monotonic() + 500
    while len(device.asked()) < begun and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = device.asked()
    assert len(before) == begun
    assert "state.json" in device.packed()
    assert json.loads((device.state / "state.json").read_text())["build"]["status"] == 0
    device.record.unlink()
    assert device.fly("first")[0] == 0
    after = device.asked()
    assert len(before) + len(after) in (7, 8), "the step that was cut off runs again, and no other"


def test_a_step_s_output_is_kept_when_it_is_ended(device):
    """It is written at once: a killed process loses what it has buffered."""
    for limit in ("8", "30", "120"):  # on a busy machine it may take long to get there
        shutil.rmtree(device.state / "logs", ignore_errors=True)
        (device.state / "state.json").unlink(missing_ok=True)
        device.record.unlink(missing_ok=True)
        status, output = device.fly("first", "--seconds", limit, HANG_AT="2", PYTHONUNBUFFERED="")
        if len(device.asked()) == 2:
            break
    assert status == 1 and "== smoke: exit 124" in output
    assert "this is smoke.py" in (device.state / "logs" / "smoke.log").read_text()


def running(process: int) -> bool:
    try:
        state = pathlib.Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state.rsplit(")", 1)[1].split()[0] != "Z"


def test_a_step_is_ended_at_its_limit_with_all_that_it_started(tmp_path, monkeypatch):
    script = tmp_path / "step.py"
    script.write_text(
        textwrap.dedent(f"""
        import signal, subprocess, sys, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
        open({str(tmp_path / "child")!r}, "w").write(str(child.pid))
        print("begun", flush=True)
        time.sleep(100)
    """)
    )
    packings = []
    monkeypatch.setattr(flight, "PACKING", 0.5)
    for limit in (2.0, 10.0, 60.0):  # on a busy machine it may take long to get here
        step = flight.Step("endless", limit, (str(script),))
        assert flight.run(step, limit, tmp_path / "log", sys.executable, lambda: packings.append(1)) == 124
        if len(packings) >= 2 and "begun" in (tmp_path / "log").read_text():
            break
    assert len(packings) >= 2 and "begun" in (tmp_path / "log").read_text()
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 500  # the signal is sent; a busy system may take a while to carry it out
    while running(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not running(child)


def test_a_full_disk_stops_nothing(device, tmp_path):
    blocked = tmp_path / "a-file"
    blocked.touch()
    status, output = device.fly("first", OUT=str(blocked / "out"))
    assert status == 0 and len(device.asked()) == 7 and "was not written" in output
    record = device.record.read_text()
    device.record.unlink()
    status, output = device.fly("first", FLIGHT_STATE=str(blocked / "state"), OUT=str(device.out))
    assert len(device.asked()) == len(record.splitlines()) and "no log" in output


def test_a_python_that_does_not_start_is_no_end(device):
    status, output = device.fly("first", FLIGHT_PYTHON="/nowhere/python")
    assert status == 1 and output.count("does not start") >= 6 and "state.json" in device.packed()


def test_what_is_missing_costs_its_own_step(device, tmp_path):
    """With nothing but Python, and no GPU for steps that do find torch, every step fails separately and is recorded."""
    (device.state / "folder").unlink()
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')
    bare.chmod(0o755)
    status, output = device.fly("first", FLIGHT_PYTHON=str(bare), PYTHONPATH="")
    assert status == 1 and "No module named" in output
    with tarfile.open(device.out / "flight.tar.gz") as tar:
        state = next(m for m in tar.getmembers() if m.name.endswith("state.json"))
        noted = json.load(tar.extractfile(state))
    assert len(noted) == 7 and not [name for name, step in noted.items() if step["status"] in (0, "running")]
    assert (device.state / "results" / "tests").exists() and not list(ROOT.glob("benchmarks/results/cuda-unknown*"))


def test_packs_what_fits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = pathlib.Path("results")
    (folder / "triton-cache").mkdir(parents=True)
    (folder / "triton-cache" / "kernel").write_text("no")
    (folder / "results.csv").write_text("a,b\n")
    (folder / "long.log").write_bytes(os.urandom(3 << 20))
    for n in range(3):
        (folder / f"huge-{n}.bin").write_bytes(os.urandom(7 << 20))
    target = tmp_path / "out" / "flight.tar.gz"
    assert flight.pack([folder], target) and target.stat().st_size <= 16 << 20
    with tarfile.open(target) as tar:
        sizes = {member.name: member.size for member in tar.getmembers()}
    assert sizes["results/results.csv"] == 4 and sizes["results/long.log"] < 300 << 10
    assert not any("triton-cache" in name for name in sizes)


TESTS = """
import os, signal, time
import pytest

@pytest.mark.parametrize("n", range(6))
def test_passes(n):
    assert {right}

def test_fails():
    assert {right}, "not the right value"

def test_leaves_the_gpu_in_an_error():
    if not {right}:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

def test_crashes():
    if not {right}:
        os.kill(os.getpid(), signal.SIGSEGV)

def test_hangs():
    if not {right}:
        time.sleep(100)

def test_skips():
    pytest.skip("not here")
"""


def _run_tests(folder, *more):
    command = [sys.executable, str(ROOT / "benchmarks" / "flight_tests.py"), "--groups", "mine=test_mine.py"]
    command += ["--output", str(folder / "out"), "--workers", "2", "--marker", "not none", "--test-limit", "10", *more]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=500)


def test_a_test_that_ruins_its_process_costs_itself_alone(tmp_path):
    file, report = tmp_path / "test_mine.py", tmp_path / "out" / "mine.jsonl"
    file.write_text(TESTS.format(right="False").replace("assert False\n", "assert True\n", 1))
    assert _run_tests(tmp_path).returncode == 1
    found = {test.partition("::")[2]: entry for test, entry in flight_tests.outcomes(report).items()}
    assert sum(entry["outcome"] == "passed" for entry in found.values()) == 6
    assert {name for name, entry in found.items() if entry["outcome"] == "failed"} == {
        "test_fails", "test_leaves_the_gpu_in_an_error", "test_crashes", "test_hangs",
    }  # fmt: skip
    assert found["test_skips"]["outcome"] == "skipped" and "took over 10 s" in found["test_hangs"]["message"]
    cases = list(xml.etree.ElementTree.parse(report.with_suffix(".xml")).iter("testcase"))
    assert len(cases) == len(found) == 11 and {case.get("classname") for case in cases} == {"test_mine"}
    before = len(report.read_text().splitlines())
    file.write_text(TESTS.format(right="True"))
    assert _run_tests(tmp_path).returncode == 0
    assert len(report.read_text().splitlines()) == before + 4, "those that had passed are not run again"


def test_a_run_cut_short_verifies_nothing(tmp_path):
    tests = "import time\ndef test_one():\n    pass\ndef test_two():\n    time.sleep(50)\n"
    (tmp_path / "test_mine.py").write_text(tests)
    done = _run_tests(tmp_path, "--seconds", "8", "--test-limit", "60")
    assert done.returncode == 1 and "not all were run" in done.stdout
    cases = list(xml.etree.ElementTree.parse(tmp_path / "out" / "mine.xml").iter("testcase"))
    assert any(case.find("error") is not None for case in cases)


def test_the_plan_names_what_there_is():
    from transformer_fast.benchmarks import ledger
    from transformer_fast.benchmarks.generation_cases import generation_cases
    from transformer_fast.benchmarks.gpu_cases import gpu_cases
    from transformer_fast.benchmarks.model_cases import gpu_model_cases

    assert {name for names in flight.SMOKES.values() for name in names} <= set(smoke.CASES)
    files = [ROOT / file for files in flight_tests.GROUPS.values() for file in files]
    assert all(file.exists() for file in files)
    for pattern in ledger.OPS.values():
        file = pattern.partition("(")[0]
        proving = {path for path in (ROOT / "tests" / "ops").glob("test_*.py") if re.search(file, path.stem)}
        assert proving and proving <= set(files), pattern
    cases = [case.name for case in (*gpu_cases("cpu"), *gpu_model_cases("cpu"), *generation_cases("cuda"))]
    for call in ("first", "second", "third", "tune"):
        steps = flight.plan(call, pathlib.Path("results"))
        assert sum(step.seconds for step in steps if step.name not in ("build",)) < 2.7 * flight.CALL
        for step in steps:
            assert {group for group, _ in step.groups} <= set(flight_tests.GROUPS)
            if "--only" in step.command:
                limit = float(step.command[step.command.index("--case-limit") + 1])
                assert 0 < limit < step.seconds and ("--slow" in step.command or 2 * limit < step.seconds)
                only = step.command[step.command.index("--only") + 1].split(",")
                assert all(fnmatch.filter(cases, pattern) for pattern in only), step
    every = {group for step in flight.plan("second", pathlib.Path("results")) for group, _ in step.groups}
    assert every == set(flight_tests.GROUPS), "a group that no step runs"
    assert flight.CALL < 300 and len({step.name for step in flight.plan("first", pathlib.Path("r"))}) == 7


def test_settings_that_the_flight_makes_are_read_by_somebody():
    """A build that must fail without CUDA code must not succeed because the variable has another name."""
    made = {
        name
        for file in (*(ROOT / "benchmarks").glob("*.py"), ROOT / "benchmarks" / "gpu.sh")
        for name in re.findall(r"\bTRANSFORMER_FAST_[A-Z_]+", file.read_text())
    }
    sources = [ROOT / "setup.py", *(ROOT / "transformer_fast").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    text = "\n".join(source.read_text() for source in sources)
    read = set(re.findall(r'environ(?:\.get\(|\[)\s*"(TRANSFORMER_FAST_[A-Z_]+)"\]?(?! *=)', text))
    assert {"TRANSFORMER_FAST_NATIVE", "TRANSFORMER_FAST_CUDA_ARCHS"} <= made <= read
