"""The GPU benchmark cases, run small and on the CPU, so that none fails on a GPU for a trivial reason."""

import contextlib
import types

import pytest
import torch
from transformer_fast.benchmarks import gpu_cases as module
from transformer_fast.benchmarks import run, timing
from transformer_fast.benchmarks.case import OURS, missing
from transformer_fast.benchmarks.flight_cache import OnTheCpu
from transformer_fast.benchmarks.gpu_cases import OURS_CUDA, gpu_cases
from transformer_fast.benchmarks.model_cases import gpu_model_cases

OPS = {case.name: case for case in gpu_cases("cpu")}
MODELS = {case.name: case for case in gpu_model_cases("cpu")}
ONLY_ON_A_GPU = ("SDPA cuDNN", "Liger", OURS_CUDA)


@pytest.fixture
def uncompiled(monkeypatch):
    """Make torch.compile return its argument: compilation is not under test, and takes minutes."""
    monkeypatch.setattr(torch, "compile", lambda function=None, **_: function)


def _of_each_kind() -> list[str]:
    """The first of the cases that differ only in size, as all run small here."""
    first: dict[tuple, str] = {}
    for name, case in OPS.items():
        first.setdefault((case.group, case.title.split(",")[0].split("(")[0], "causal" in name), name)
    return list(first.values())


@pytest.mark.filterwarnings("ignore")  # flex_attention's, that it is not compiled
@pytest.mark.parametrize("name", _of_each_kind())
def test_op_case_runs_small(name, uncompiled):
    case = OPS[name]
    inputs, found = case.inputs(True), {}
    for candidate in case.candidates:
        if candidate.name in ONLY_ON_A_GPU or missing(candidate, "cuda"):
            continue
        if candidate.name == "flex_attention" and case.group not in ("attention-forward", "t5-bias-forward"):
            continue  # this candidate has no backward pass on the CPU
        call = candidate.prepare(inputs)
        call()  # timed calls repeat: graphs and caches must survive the first call
        output = call()
        if case.result is not None and candidate.comparable:
            found[candidate.name] = [t.detach().double() for t in run._tensors(case.result(output, inputs))]
    for candidate, tensors in found.items():
        assert run._difference(tensors, found[case.peer]) < run.DISAGREEMENT, candidate


@pytest.mark.parametrize("name", [name for name in MODELS if "bert-base" in name])
def test_model_case_runs_small(name, uncompiled):
    case = MODELS[name]
    inputs, found = case.inputs(True), {}
    for candidate in case.candidates:
        if candidate.name in (OURS, case.peer, "torch.compile"):
            output = candidate.prepare(inputs)()
            found[candidate.name] = output if case.result is None else case.result(output, inputs)
    assert all(t.isfinite().all() for t in found.values())
    if case.result is not None:
        assert all(t.dtype == torch.bfloat16 for t in found.values())
        assert run._difference([found[OURS].double()], [found[case.peer].double()]) < 2 * run.DISAGREEMENT


@pytest.mark.quick
def test_every_case_says_its_work_its_peer_and_its_bar():
    cases = {**OPS, **MODELS}
    for name, case in cases.items():
        names = [candidate.name for candidate in case.candidates]
        assert names[0] == OURS and case.peer in names and "/" in name and case.dtype == "bf16"
        assert case.flops or case.bytes
        assert case.bar is not None or name == "t5-bias-forward/bf16-b32-s512" or "-s512" in name
    assert len(cases) == len(gpu_cases("cpu")) + len(gpu_model_cases("cpu"))
    lengths = {int(name.split("-s")[1].split("-")[0]) for name in OPS if name.startswith("attention-forward")}
    assert lengths == {512, 1024, 2048, 4096, 8192, 16384}


@pytest.mark.quick
def test_plots_understand_every_attention_case():
    from transformer_fast.benchmarks import plot

    for name, case in OPS.items():
        if case.group.startswith("attention-"):
            panel = plot._panel({"case": name, "shape": case.shape, "dtype": case.dtype})
            assert panel.startswith("bf16, D ") and ("causal" in panel) == ("causal" in name)


@pytest.mark.quick
def test_a_bar_may_ask_for_a_share_of_the_ceiling():
    row = {"candidate": OURS, "note": "", "peak_memory_mb": "", "ratio_to_peer": "1.2"}
    case = OPS["norm-forward/bf16-layer-norm-4096x768"]
    timings = {OURS: run.Timing([1.0]), case.peer: run.Timing([1.2])}
    for share, met in (("0.9", "yes"), ("0.85", "no")):
        mine = row | {"share_of_ceiling": share}
        run._judge([mine], case, timings)
        assert mine["met"] == met and mine["bar"].endswith("88% of the ceiling")


@pytest.mark.quick
def test_short_kernels_on_a_gpu_are_replayed_in_a_graph(monkeypatch):
    """The launches of such short kernels take longer than the kernels themselves."""
    captured = []
    monkeypatch.setattr(module, "graphed", lambda prepare: captured.append(prepare) or prepare())
    for group in ("decode", "norm-forward", "norm-backward"):
        case = next(case for case in gpu_cases("cuda") if case.group == group)
        with OnTheCpu():
            inputs = case.inputs(True)
            outputs = [run._tensors(case.candidate(name).prepare(inputs)()) for name in (OURS, case.peer)]
        assert len(captured) == 2 and outputs[0][0].shape == outputs[1][0].shape
        captured.clear()


@pytest.fixture
def events(monkeypatch):
    """What a capture does, in place of CUDA."""
    found = []

    class Graph:
        def replay(self):
            found.append("replay")

    stream = types.SimpleNamespace(wait_stream=lambda other: found.append("wait"))
    generator = types.SimpleNamespace(clone_state=lambda: "usable", graphsafe_set_state=found.append)
    fakes = {
        "Stream": lambda: stream, "stream": lambda s: contextlib.nullcontext(), "current_stream": lambda: stream,
        "CUDAGraph": Graph, "graph": lambda graph, stream: contextlib.nullcontext(found.append("capture")),
        "current_device": lambda: 0, "default_generators": [generator],
    }  # fmt: skip
    for name, value in fakes.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return found


@pytest.mark.quick
def test_a_replay_returns_what_was_captured(events):
    memory = torch.zeros(3)

    def call():
        events.append("call")
        return memory

    replay = timing.graphed(lambda: events.append("prepare") or call)
    assert replay() is memory and replay() is memory
    assert events == ["wait", "prepare", *3 * ["call"], "capture", "call", "wait", "replay", "replay"]


@pytest.mark.quick
def test_a_broken_capture_names_its_reason(events, monkeypatch):
    @contextlib.contextmanager
    def broken(graph, stream):
        try:
            yield
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "graph", broken)
    calls = iter([None, None, None, ValueError("the reason")])

    def call():
        failure = next(calls)
        if failure:
            raise failure

    with pytest.raises(ValueError, match="the reason"):
        timing.graphed(lambda: call)
    assert events[-1] == "usable"
