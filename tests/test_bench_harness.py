"""The arithmetic of the benchmark harness, with candidates whose times are known."""

import csv
import math
import os
import random
import signal
import threading

import pytest
import torch
from transformer_fast.benchmarks import cases, memory, results, run, shapes
from transformer_fast.benchmarks.case import OURS, Bar, Candidate, Case, Part, Unavailable, missing
from transformer_fast.benchmarks.ceilings import Ceilings
from transformer_fast.benchmarks.timing import Budget, Timing, interleave, percentile, ratios

import transformer_fast

TOP = Ceilings(gemm={"fp32": 2e9, "bf16": 4e9, "fp16": 4e9}, copy=1e9)
FAST = Budget(rounds=5, seconds=0.0, limit=9.0, sample=0.0, warmup=0.0)


class Clock:
    """A fake machine that slows down with every sample: each call takes its cost times the drift so far."""

    def __init__(self, drift: float = 1.0):
        self.drift, self.now = drift, 1.0

    def __call__(self, call, count: int) -> float:
        self.now *= self.drift
        return call.cost * count * self.now


def costing(seconds: float, result: float = 1.0):
    """The `prepare` function of a candidate whose call takes `seconds` on the fake clock and returns a tensor of
    `result`."""

    def prepare(inputs):
        def call():
            return torch.full((3,), result)

        call.cost = seconds
        return call

    return prepare


def case(*candidates: Candidate, bar: Bar | None = None, **more) -> Case:
    details = {"peer": "peer", "dtype": "fp32", "shape": "(2, 3)", "flops": 2e9, "bytes": 0.5e9, "memory": False}
    return Case("group/case", lambda tiny: None, candidates, bar=bar, **(details | more))


def measure(a_case: Case, **more) -> dict[str, dict]:
    rows = run.measure(a_case, "cpu", FAST, TOP, clock=more.pop("clock", Clock()), **more)
    return {row["candidate"]: row for row in rows}


@pytest.mark.quick
def test_percentiles_are_linear_between_neighbours():
    values = [random.random() for _ in range(37)]
    for q in (0, 20, 50, 80, 100):
        truth = torch.quantile(torch.tensor(values, dtype=torch.float64), q / 100).item()
        assert math.isclose(percentile(values, q), truth, rel_tol=1e-12)


@pytest.mark.quick
def test_ratio_is_taken_round_by_round():
    peer, ours = Timing([2.0, 8.0, 3.0]), Timing([1.0, 2.0, 3.0])
    assert ratios(peer, ours).seconds == [2.0, 4.0, 1.0]
    assert ratios(peer, ours).median == 2.0
    with pytest.raises(ValueError):
        ratios(peer, Timing([1.0]))


@pytest.mark.quick
def test_a_drifting_machine_hardly_moves_the_ratio():
    names = {"a": 4.0, "b": 2.0, "c": 1.0}
    calls = {name: costing(cost)(None) for name, cost in names.items()}
    order = []
    timings = interleave(
        calls,
        budget=Budget(rounds=30, seconds=0.0, sample=0.0, warmup=0.0),
        clock=Clock(1.02),
        on_sample=lambda name, turn: order.append(name),
    )
    assert timings["a"].seconds[-1] > 3 * timings["a"].seconds[0]
    assert ratios(timings["a"], timings["c"]).median == pytest.approx(4.0, rel=0.05)
    assert [order[i : i + 3] for i in (0, 3, 6)] == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"]]


@pytest.mark.quick
def test_samples_repeat_short_calls_and_give_seconds_a_call():
    counts = []

    def clock(call, count):
        counts.append(count)
        return 0.001 * count

    timings = interleave({"x": lambda: None}, budget=Budget(3, 0.0, 9.0, sample=0.02, warmup=0.002), clock=clock)
    assert timings["x"].seconds == pytest.approx([0.001] * 3)
    assert counts[-2:] == [1, 20]  # an untimed call first


@pytest.mark.quick
def test_budget_stops_slow_cases_after_three_rounds():
    budget = Budget(rounds=10, seconds=1.0, limit=5.0)
    assert not budget.enough(2, 100.0) and budget.enough(3, 5.0)
    assert not budget.enough(9, 4.0) and not budget.enough(10, 0.5) and budget.enough(10, 1.0)


@pytest.mark.quick
def test_rows_hold_ratio_rates_and_verdict():
    rows = measure(case(Candidate(OURS, costing(2.0)), Candidate("peer", costing(3.0)), bar=Bar(1.4)), clock=Clock(1.0))
    ours = rows[OURS]
    assert set(ours) == set(results.COLUMNS)
    assert float(ours["ratio_to_peer"]) == 1.5 and float(rows["peer"]["ratio_to_peer"]) == 1.0
    assert float(ours["tflops"]) == 0.001 and float(ours["gbps"]) == 0.25
    assert float(ours["share_of_ceiling"]) == 0.5  # one second of arithmetic, half a second of traffic
    assert ours["bar"] == ">= 1.4x" and ours["met"] == "yes"
    assert "differs from peer by 0.0e+00" in ours["note"]


@pytest.mark.quick
def test_the_ceiling_of_work_in_parts():
    """Each part at the slower of its two rates, int8 at int8's, weights at the rate of reading."""
    top = Ceilings(gemm={"fp32": 1e9, "int8": 8e9}, copy=1e9, read=4e9)
    parts = [Part(16e9, 1e9), Part(1e9, 12e9)]
    assert top.seconds(0, 0, "int8, peer fp32", parts) == 2.0 + 3.0
    assert top._replace(read=0.0).seconds(0, 0, "fp32", parts) == 16.0 + 12.0
    candidates = Candidate(OURS, costing(10.0)), Candidate("peer", costing(12.0))
    rows = measure(case(*candidates, flops=0.0, bytes=0.0, parts=lambda inputs: [Part(6e9, 0.0)]))
    assert float(rows[OURS]["share_of_ceiling"]) == 0.3  # of 2e9 a second


@pytest.mark.quick
@pytest.mark.parametrize(
    "bar, cost, met",
    [
        (Bar(1.6), 2.0, "no"),
        (Bar(1.0, ahead_of=("rival",)), 2.0, "yes"),
        (Bar(1.0, ahead_of=("rival",)), 2.7, "no"),
        (Bar(1.0, ahead_of=("absent",)), 2.7, "yes"),
        (Bar(microseconds=10.0), 3.000009, "yes"),
        (Bar(microseconds=10.0), 3.000011, "no"),
    ],
)
def test_bars(bar, cost, met):
    candidates = Candidate(OURS, costing(cost)), Candidate("peer", costing(3.0)), Candidate("rival", costing(2.5))
    assert measure(case(*candidates, bar=bar))[OURS]["met"] == met


@pytest.mark.quick
def test_a_fast_wrong_answer_does_not_count():
    rows = measure(case(Candidate(OURS, costing(1.0, 1.5)), Candidate("peer", costing(3.0)), bar=Bar(1.0)))
    assert rows[OURS]["met"] == "no" and rows[OURS]["note"].startswith("WRONG RESULT")


@pytest.mark.quick
def test_a_wrong_answer_of_any_backend_of_ours_is_called_so():
    forced = f"{OURS} cuda"
    wrong, far = Candidate(forced, costing(1.0, 1.5)), Candidate("rival", costing(1.0, 1.5))
    rows = measure(case(Candidate(OURS, costing(1.0)), wrong, Candidate("peer", costing(3.0)), far, bar=Bar(1.0)))
    assert rows[forced]["note"].startswith("WRONG RESULT") and rows[OURS]["met"] == "yes"
    assert rows["rival"]["note"].startswith("differs")


@pytest.mark.parametrize("ends", ["hangs", "dies"])
def test_a_case_that_no_process_lives_through_is_left_out_in_the_end(ends, tmp_path, monkeypatch):
    broken, good = (Case(f"a/{name}", None, (), "peer", "fp32", "(2, 3)") for name in ("broken", "good"))

    def measure(one, device, *_, **__):
        if one is broken:
            threading.Event().wait() if ends == "hangs" else os.kill(os.getpid(), signal.SIGKILL)
        return [run._row(one, OURS, device, "")]

    monkeypatch.setattr(run, "measure", measure)
    monkeypatch.setattr(run.case_list, "all_cases", lambda device: [broken, good])
    monkeypatch.setattr(run.ceiling, "measure", lambda *_: TOP)
    monkeypatch.setattr(results, "machine", lambda device: {"load_average": 0.0, "cores": 1, "device": device})

    arguments = ["--output", str(tmp_path), "--missing", "--no-memory", "--no-plots"]

    def status(limit: float) -> int:
        child = os.fork()
        if child == 0:
            try:
                os._exit(run.main([*arguments, "--case-limit", str(limit)]))
            finally:
                os._exit(99)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    lost = run.GPU_LOST if ends == "hangs" else -signal.SIGKILL
    assert [status(0.2), status(0.2), status(1000.0)] == [lost, lost, 0]
    notes = {row["case"]: row["note"] for row in results.read(tmp_path)}
    assert list(notes) == ["a/broken", "a/good"] and not notes["a/good"]
    assert notes["a/broken"].startswith("failed: 2 times")
    assert (tmp_path / "begun.json").read_text() == "{}"
    # Results of a case stay if it is started again (e.g. with slow candidates) and hangs.
    arguments.remove("--missing")
    (tmp_path / "begun.json").write_text('{"a/broken": 2, "a/good": 2}')
    assert status(1000.0) == 0 and {row["case"]: row["note"] for row in results.read(tmp_path)} == notes


@pytest.mark.quick
def test_missing_peers_are_rows_not_errors():
    def refuses(inputs):
        raise Unavailable("no such thing here")

    def breaks(inputs):
        raise RuntimeError("first line\nsecond line")

    rows = measure(
        case(
            Candidate(OURS, costing(1.0)),
            Candidate("peer", costing(3.0)),
            Candidate("absent", costing(1.0), requires=("torch", "surely_not_installed")),
            Candidate("refuses", refuses),
            Candidate("breaks", breaks),
            Candidate("other device", costing(1.0), works_on=("cuda",)),
            Candidate("slow", costing(1.0), slow=True),
        ),
        slow=False,
    )
    assert rows["absent"]["note"] == "not installed: surely_not_installed"
    assert rows["refuses"]["note"] == "no such thing here"
    assert rows["breaks"]["note"] == "failed: RuntimeError: first line"
    assert all(rows[name]["median_s"] == "" for name in ("absent", "refuses", "breaks"))
    assert "other device" not in rows and "slow" not in rows
    assert rows[OURS]["ratio_to_peer"] == "3"


@pytest.mark.quick
def test_bar_is_not_met_without_its_peer():
    rows = measure(case(Candidate(OURS, costing(1.0)), Candidate("peer", costing(1.0), ("not_here",)), bar=Bar(1.0)))
    assert rows[OURS]["met"] == "no" and rows[OURS]["ratio_to_peer"] == ""


@pytest.mark.quick
@pytest.mark.parametrize("ours, verdict", [(90.0, "yes"), (100.9, "yes"), (101.1, "no")])
def test_memory_verdict(ours, verdict):
    used = {OURS: ours, "peer": 100.0}
    rows = measure(
        case(Candidate(OURS, costing(1.0)), Candidate("peer", costing(1.0)), memory=True),
        peak=lambda work, *, name, candidate, device, threads: used[candidate],
    )
    assert rows[OURS]["memory_met"] == verdict and rows[OURS]["peak_memory_mb"] == f"{ours:.1f}"


def allocates(megabytes: int, kept: int):
    """A candidate for memory.peak_memory_mb: 50 MB of inputs, `kept` MB of weights, `megabytes` MB while running."""
    inputs = torch.ones(50_000_000, dtype=torch.uint8)
    yield
    torch.ones(200_000_000, dtype=torch.uint8)  # memory that only building uses
    weights = torch.ones(kept * 1_000_000, dtype=torch.uint8)
    yield
    scratch = torch.ones(megabytes * 1_000_000, dtype=torch.uint8)
    assert inputs.numel() and weights.numel() and scratch.numel()


def test_peak_memory_counts_weights_and_work_but_not_inputs(monkeypatch):
    import pathlib

    monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(__file__).parent))
    used = memory.peak_memory_mb(f"{pathlib.Path(__file__).stem}:allocates", megabytes=80, kept=30)
    assert 109 <= used <= 114
    with pytest.raises(RuntimeError, match="TypeError"):
        memory.peak_memory_mb(f"{pathlib.Path(__file__).stem}:allocates", wrong=1)


@pytest.mark.quick
def test_results_merge_reread_and_find_the_newest(tmp_path):
    about = {"device": "cpu-test-2c", "time": "2026-01-02T00:00:00", "commit": "abc"}
    folder = results.result_folder(about, tmp_path)
    assert folder == tmp_path / "cpu-test-2c" / "2026-01-02-abc"

    def row(name, candidate, note):
        return dict.fromkeys(results.COLUMNS, "") | {"case": name, "candidate": candidate, "note": note}

    results.write(folder, [row("a", "x", "1"), row("a", "gone", "1"), row("b", "x", "1")], {}, about)
    results.write(folder, [row("a", "x", "2, with a comma")], {}, about)
    found = {(r["case"], r["candidate"]): r["note"] for r in results.read(folder)}
    assert found == {("b", "x"): "1", ("a", "x"): "2, with a comma"}

    later = {**about, "time": "2026-01-02T10:00:00", "commit": "0ld"}
    results.write(results.result_folder(later, tmp_path), [], {}, later)
    assert results.newest("cpu", tmp_path).name == "2026-01-02-0ld"
    assert results.newest("cuda", tmp_path) is None
    assert results.newest("cpu", tmp_path, {folder}) == folder

    with open(folder / "results.csv", "w", newline="") as file:
        csv.writer(file).writerows([["case", "other"], ["a", "1"]])
    with pytest.raises(ValueError, match="columns"):
        results.read(folder)


@pytest.mark.quick
def test_machine_names_no_host():
    import socket

    about = results.machine("cpu")
    assert about["device"].startswith("cpu-") and about["device"].endswith("c")
    assert socket.gethostname().lower() not in str(about).lower()
    assert about["versions"]["torch"].startswith(torch.__version__.split("+")[0])


@pytest.mark.quick
def test_a_copy_is_as_clean_as_the_checkout_it_was_made_from(monkeypatch):
    monkeypatch.setattr(results, "_changed", lambda: True)
    for commit, dirty in (("", True), ("0123456789", False), ("0123456789-dirty", True)):
        monkeypatch.setenv("TRANSFORMER_FAST_COMMIT", commit)
        about = results.machine("cpu")
        assert about["dirty"] is dirty and about["commit"].startswith(commit)


@pytest.mark.quick
def test_a_case_with_a_candidate_that_failed_is_not_measured(tmp_path):
    rows = [dict.fromkeys(results.COLUMNS, "") | {"case": case, "note": note}
            for case, note in (("a", ""), ("a", "failed: why"), ("b", ""), ("b", "not installed"))]  # fmt: skip
    results.write(tmp_path, rows, {}, {})
    assert run._measured(tmp_path) == {"b"}


@pytest.mark.quick
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_are_well_formed(device):
    monkey = cases.all_cases("cpu") if device == "cpu" else cases.model_cases("cuda")
    names = [c.name for c in monkey]
    assert len(set(names)) == len(names)
    for c in monkey:
        assert c.candidates[0].name == OURS and any(candidate.name == c.peer for candidate in c.candidates)
        assert c.group == c.name.split("/")[0] and "/" in c.name
        assert all(missing(candidate, device) is not None for candidate in c.candidates)


@pytest.mark.quick
def test_select():
    everything = cases.all_cases("cpu")
    chosen = [c.name for c in cases.select(everything, "overhead,attention-forward/fp32-b8-s512*")]
    assert "attention-forward/fp32-b8-s512" in chosen and "attention-forward/fp32-b8-s512-causal" in chosen
    assert all(name.startswith(("overhead/", "attention-forward/fp32-b8-s512")) for name in chosen)
    ordered = [c.name for c in cases.select(everything, "attention-forward/fp32-b8-s512,attention-forward/*s128")]
    assert "b8-s512" in ordered[0] and ordered[-1].endswith("b8-s128")
    assert cases.select(everything, None) == everything and not cases.select(everything, "nothing like it")


@pytest.mark.quick
@pytest.mark.parametrize("count, mean", [(32, 40), (16, 40), (5, 60)])
def test_ragged_lengths(count, mean):
    lengths = shapes.ragged_lengths(count, mean)
    assert len(lengths) == count and sum(lengths) == mean * count and max(lengths) == 128 and min(lengths) >= 4
    assert lengths == shapes.ragged_lengths(count, mean) != shapes.ragged_lengths(count, mean, seed=1)
    assert len(set(lengths)) > 3


@pytest.mark.parametrize(
    "name",
    [
        "attention-forward/fp32-b8-s128-causal",
        "attention-training/fp32-b8-s128-bias-gradient",
        "pointwise/fp32-add-layer-norm-4096x768",
        "pointwise/fp32-bias-gelu-4096x768",
        "pointwise/fp32-gelu-tanh-4096x768",
        "pointwise/fp32-swiglu-1024x3072",
        "pointwise/fp32-geglu-1024x3072",
        "rotary-append/fp32-b8-s1-cached1024",
        "rotary-append/fp32-b1-s512-cached0",
    ],
)
def test_op_cases_agree_with_their_peer_on_small_inputs(name):
    found = cases.find(name)
    inputs = found.inputs(True)
    calls = [found.candidate(c).prepare(inputs) for c in (OURS, found.peer)]
    outputs = [run._tensors(found.result(call(), inputs)) for call in calls]  # copies, as calls may write in place
    assert run._difference(*[[t.detach().double() for t in out] for out in outputs]) < run.DISAGREEMENT


@pytest.mark.parametrize("name", ["inference/modernbert-base-ragged-32", "inference/deberta-v3-base-ragged-32"])
def test_encoder_cases_agree_with_their_peer_on_small_inputs(name, monkeypatch, tmp_path):
    monkeypatch.setenv("TRANSFORMER_FAST_BENCHMARK_CACHE", str(tmp_path))
    found = cases.find(name)
    inputs = found.inputs(True)
    candidates = (OURS, found.peer, "HF with accelerate()")
    ours, *others = [found.result(found.candidate(c).prepare(inputs)(), inputs).double() for c in candidates]
    assert all(run._difference([ours], [other]) < run.DISAGREEMENT for other in others)


def test_command_writes_results_and_plots(tmp_path, monkeypatch, capsys):
    absent = Candidate("absent", costing(1.0), ("not_here",))
    fake = case(Candidate(OURS, costing(1.0)), Candidate("peer", costing(3.0)), absent, bar=Bar(1.0))
    attention = Case(
        "attention-forward/fp32-b1-s16", lambda tiny: None, fake.candidates, "peer", "fp32", "(1, 1, 16, 8)", flops=1e6
    )
    monkeypatch.setattr(cases, "all_cases", lambda device: [fake, attention])
    monkeypatch.setattr(run.ceiling, "measure", lambda device, budget: TOP)
    monkeypatch.setattr(run, "QUICK", FAST)
    assert run.main(["--quick", "--no-memory", "--output", str(tmp_path)]) == 0
    rows = results.read(tmp_path)
    assert len(rows) == 6 and list(rows[0]) == results.COLUMNS
    for name in ("machine.json", "ceilings.json", "speedup-group.png", "rate-attention-forward.png"):
        assert (tmp_path / name).stat().st_size > 0
    assert run.main(["--only", "no such case"]) == 2
    assert "no case matches" in capsys.readouterr().err


@pytest.mark.quick
def test_an_installed_copy_writes_into_the_current_folder(monkeypatch, tmp_path):
    about = {"device": "cpu-test", "time": "2026-01-02T00:00:00", "commit": "abc"}
    assert results.result_folder(about) == results.ROOT / "cpu-test" / "2026-01-02-abc"
    monkeypatch.setattr(results, "CHECKOUT", False)
    monkeypatch.chdir(tmp_path)
    assert results.result_folder(about).resolve() == tmp_path / "transformer_fast_results/cpu-test/2026-01-02-abc"
    assert results.machine("cpu")["commit"] == f"v{transformer_fast.__version__}"  # not that of an outer repository


@pytest.mark.quick
def test_candidates_that_must_not_run_do_not():
    ran = []
    wrong = Candidate(f"{OURS} cuda", lambda inputs: ran.append(1))
    candidates = Candidate(OURS, costing(1.0)), wrong, Candidate("peer", costing(3.0))
    rows = measure(case(*candidates, bar=Bar(1.0)), without=frozenset([f"{OURS} cuda"]))
    assert not ran and rows[f"{OURS} cuda"]["note"].startswith("left out") and rows[OURS]["met"] == "yes"


@pytest.mark.quick
def test_an_error_while_it_is_timed_is_a_note():
    def clock(call, count):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    rows = measure(case(Candidate(OURS, costing(1.0)), Candidate("peer", costing(3.0)), bar=Bar(1.0)), clock=clock)
    assert "not timed: RuntimeError: CUDA error" in rows[OURS]["note"] and rows[OURS]["met"] == "no"


def test_low_precision_is_judged_by_its_cosine():
    half = torch.tensor([[1.0, 0.0], [0.0, 1.0]])

    def giving(value: torch.Tensor):
        def prepare(inputs):
            call = lambda: value  # noqa: E731
            call.cost = 1.0
            return call

        return prepare

    rows = measure(
        case(
            Candidate(OURS, giving(half + torch.tensor([[0.0, 0.1], [0.0, 0.0]])), low_precision=True),
            Candidate("peer", giving(half)),
        )
    )
    assert rows[OURS]["note"] == "cosine to peer: mean 0.99752, least 0.9950"
