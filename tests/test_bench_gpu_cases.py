"""The GPU benchmark cases, run small and on the CPU, so that none fails on a GPU for a trivial reason."""

import contextlib
import types

import pytest
import torch
from transformer_fast.benchmarks import calls, graphs, run
from transformer_fast.benchmarks.calls import OURS_CUDA
from transformer_fast.benchmarks.case import OURS, missing
from transformer_fast.benchmarks.flight_cache import OnTheCpu
from transformer_fast.benchmarks.gpu_cases import gpu_cases
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
        assert case.flops or case.bytes or case.group == "host"
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
def test_every_panel_of_the_rates_shows_all_its_points(monkeypatch, tmp_path):
    from transformer_fast.benchmarks import plot

    rows = [
        {"case": f"attention-forward/bf16-b4-s4096{more}", "shape": f"(4, 32, 4096, {d})", "dtype": "bf16",
         "device": "cuda", "candidate": name, "tflops": str(rate)}
        for more, d, rate in (("", 64, 100), ("-d128", 128, 900)) for name in (OURS, OURS_CUDA, "SDPA flash")
    ]  # fmt: skip
    figures = []
    monkeypatch.setattr(plot, "_save", lambda figure, path: figures.append(figure))
    plot.attention_rates(rows, "attention-forward", tmp_path)
    for axes in figures[0].axes:
        assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > 900
        assert len({line.get_color() for line in axes.lines}) == 3
    plot.plt.close(figures[0])


@pytest.mark.quick
def test_a_bar_may_ask_for_a_share_of_the_ceiling():
    row = {"candidate": OURS, "note": "", "peak_memory_mb": "", "ratio_to_peer": "1.2"}
    case = OPS["norm-forward/bf16-layer-norm-4096x768"]
    timings = {OURS: run.Timing([1.0]), case.peer: run.Timing([1.2])}
    for share, met in (("0.9", "yes"), ("0.85", "no")):
        mine = row | {"share_of_ceiling": share}
        run._judge([mine], case, timings)
        assert mine["met"] == met and mine["bar"].endswith("88% of the ceiling")


KERNELS = sorted({case.group for case in OPS.values()} - {"host"})


@pytest.mark.quick
@pytest.mark.parametrize("group", KERNELS)
def test_kernels_on_a_gpu_are_timed_by_graphs_alone(group, monkeypatch):
    """Launching short kernels takes longer than they run, and a backward pass from Python longer still."""
    captured = []
    monkeypatch.setattr(calls, "graphed", lambda prepare: captured.append(prepare) or prepare())
    case = next(case for case in gpu_cases("cuda") if case.group == group)
    with OnTheCpu():
        inputs = case.inputs(True)
        for count, name in enumerate((OURS, case.peer), 1):
            case.candidate(name).prepare(inputs)()
            assert len(captured) == count


class FakeCuda:
    """Notes what a capture does; it fails at its end, as torch's does after an error of a kernel's launch."""

    def __init__(self, monkeypatch, fails: bool):
        self.events = events = []
        stream = types.SimpleNamespace(wait_stream=lambda other: events.append("wait"))

        class Graph:
            def replay(self):
                events.append("replay")

        @contextlib.contextmanager
        def capture(graph, pool, stream):
            events.append("capture")
            try:
                yield
            finally:
                if fails:
                    raise RuntimeError("the capture ended with an error")

        generator = types.SimpleNamespace(
            clone_state=lambda: "before", graphsafe_set_state=lambda state: events.append(f"random numbers {state}")
        )
        fakes = {
            "Stream": lambda: stream, "stream": lambda s: contextlib.nullcontext(), "current_stream": lambda: stream,
            "CUDAGraph": Graph, "graph": capture, "graph_pool_handle": lambda: (0, 1), "current_device": lambda: 0,
            "default_generators": [generator], "set_stream": lambda s: events.append("stream"),
        }  # fmt: skip
        for name, value in fakes.items():
            monkeypatch.setattr(torch.cuda, name, value)
        for name in ("endAllocateToPool", "releasePool"):
            note = lambda device, pool, name=name: events.append(name)  # noqa: E731
            monkeypatch.setattr(torch._C, f"_cuda_{name}", note, raising=False)
        graphs._stream.cache_clear()


@pytest.mark.quick
def test_a_replay_returns_what_was_captured(monkeypatch):
    cuda, memory = FakeCuda(monkeypatch, fails=False), torch.zeros(3)
    replay = graphs.graphed(lambda: cuda.events.append("prepare") or (lambda: cuda.events.append("call") or memory))
    assert replay() is memory and replay() is memory
    assert cuda.events == ["wait", "prepare", *["call"] * 3, "wait", "capture", "call", "replay", "replay"]


@pytest.mark.quick
def test_a_failed_capture_is_undone_and_its_first_error_reported(monkeypatch):
    cuda, attempts = FakeCuda(monkeypatch, fails=True), []

    def call():
        attempts.append(0)
        if len(attempts) == 4:  # after three calls to warm up
            raise RuntimeError("a kernel cannot be captured")

    with pytest.raises(RuntimeError, match="a kernel cannot be captured"):
        graphs.graphed(lambda: call)
    assert cuda.events[-4:] == ["stream", "random numbers before", "endAllocateToPool", "releasePool"]
    with pytest.raises(RuntimeError, match="the capture ended with an error"):
        graphs.graphed(lambda: lambda: None)
