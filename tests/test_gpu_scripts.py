"""The scripts that compare kernels on a GPU, as far as they run without one."""

import csv
import pathlib
import re

import pytest
import torch
from scripts import load_script
from transformer_fast.benchmarks.flight_cache import OnTheCpu

pytestmark = pytest.mark.quick
ROOT = pathlib.Path(__file__).resolve().parent.parent


def test_the_shapes_in_use_are_among_those_that_are_timed():
    tiles = load_script(ROOT / "benchmarks" / "wgmma_tiles.py")
    source = (ROOT / "csrc" / "cuda" / "attention_forward_wgmma.cu").read_text()
    used = re.findall(r"ForwardWgmmaShape<T, (\d+), (\d+), (\d+), (\w+), (\w+), (\w+)>", source)
    assert len(used) == 4
    timed = list(tiles.shapes())
    for dim, queries, keys, *flags in used:
        causal, lazy, turns = (flag == "true" for flag in flags)
        assert tiles.Shape(int(dim), causal, int(queries), int(keys), lazy, turns) in timed
    assert len({shape.file for shape in timed}) == len(timed)


def test_a_shape_is_compiled_with_all_of_its_macros():
    tiles = load_script(ROOT / "benchmarks" / "wgmma_tiles.py")
    shape = next(tiles.shapes())
    macros = {part for part in tiles.command(shape, pathlib.Path("x.so")) if part.startswith("-DSHAPE_")}
    read = set(re.findall(r"SHAPE_[A-Z_]+", tiles.SOURCE.read_text().partition("using Shape")[2].partition(";")[0]))
    assert {macro.partition("=")[0] for macro in macros} == {f"-D{name}" for name in read}


@pytest.mark.parametrize(
    "kernel, name",
    [
        ("void tf::cuda::attention_backward_wgmma_kernel<__nv_bfloat16, 64, 128>(tf::cuda::BackwardWgmma)",
         "attention_backward_wgmma_kernel"),
        ("void at::native::(anonymous namespace)::norm<c10::BFloat16, float>(int)", "norm"),
        ("_layer_norm_forward_kernel", "_layer_norm_forward_kernel"),
        ("Memcpy DtoD (Device -> Device)", "Memcpy DtoD "),
    ],
)  # fmt: skip
def test_names_of_kernels(kernel, name):
    assert load_script(ROOT / "benchmarks" / "gpu_kernels.py").name_of(kernel) == name


def test_a_row_compares_two_backends_and_says_why_one_cannot_run(monkeypatch, tmp_path):
    choice = load_script(ROOT / "benchmarks" / "backend_choice.py")
    times = iter([30.0, 60.0, 10.0, 15.0, 7.0])

    def once(prepare):
        prepare()()
        return next(times)

    monkeypatch.setattr(choice, "microseconds", once)
    monkeypatch.setattr(choice, "BACKENDS", ("eager", "cpu"))
    monkeypatch.setattr(choice, "calls", lambda: [
        choice.Attention("padded", 2, 2, 8, 16, lambda b, s: {"key_lengths": torch.full((b,), 5, device="cuda")}),
        choice.Attention("bad", 2, 2, 8, 16, lambda b, s: {"bias": torch.ones(3, 3)}),
    ])  # fmt: skip
    monkeypatch.setattr("sys.argv", ["backend_choice.py", str(tmp_path / "x.csv")])
    monkeypatch.setattr(choice, "TOKENS", 64)
    with OnTheCpu(), pytest.raises(ValueError, match="bias"):  # a wrong call is no result
        choice.main()
    first = list(csv.reader((tmp_path / "x.csv").read_text().splitlines()))[1]
    assert first == ["padded", "30.0", "10.0", "60.0", "15.0", "3.00", "4.00", ""]
