"""benchmarks/sass_model.py on machine code that is small enough to count by hand."""

import itertools

import pytest
from transformer_fast.benchmarks import sass_model
from transformer_fast.kernels import attention_configurations as configurations

pytestmark = pytest.mark.quick

SASS = """
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   WARPGROUP.ARRIVE ;
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT ;
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
{under}
        /*0060*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0070*/              @!P0 BRA `(.L_x_2) ;
{masks}
.L_x_2:
{after}
        /*00f0*/               @P1 BRA `(.L_x_1) ;
        /*0100*/                   EXIT ;
"""


def _line(text):
    return f"        /*0040*/                   {text} ;\n"


def _loop(under="", after=""):
    masks = _line("FSEL R1, R1, -INF , P0") * 8
    (items,) = sass_model.parse(SASS.format(under=under, masks=masks, after=after)).values()
    return sass_model.main_loop(items)


def test_the_loop_is_found_without_the_masks_of_an_edge():
    loop = _loop(after=_line("MUFU.EX2 R3, R3") * 3)
    assert loop.count("HGMMA") == 2 and loop.count("MUFU") == 3 and loop.count("FSEL", "EXIT", "MOV") == 0


def test_a_left_operand_in_registers_is_not_read_from_shared_memory():
    def shape(operands):
        return sass_model.product_shape(sass_model.Instruction("HGMMA.64x128x16.F32.BF16", operands))

    assert shape("R24, gdesc[UR4], R24") == (128, 128 * 32 + 64 * 32, 64)
    assert shape("R24, R200, gdesc[UR4].tnspB, R24") == (128, 128 * 32, 64)


@pytest.mark.parametrize("exponentials", [8, 100])
def test_arithmetic_before_the_wait_runs_under_the_products(exponentials):
    """Two products take 128 clocks of the tensor cores, an exponential 8 clocks of its pipe."""
    work = _line("MUFU.EX2 R3, R3") * exponentials
    under, after = (sass_model.simulate(loop, 1, 1) for loop in (_loop(under=work), _loop(after=work)))
    assert after >= 128 + 8 * exponentials
    assert max(128, 8 * exponentials) <= under <= max(128, 8 * exponentials) + 80


def test_a_second_warpgroup_fills_the_gaps_of_the_first():
    loop = _loop(after=_line("FADD R3, R3, R4") * 100)
    alone, both = sass_model.simulate(loop, 1, 1), sass_model.simulate(loop, 2, 1)
    assert both < 1.6 * alone


def test_products_from_registers_are_a_pipe_s_work():
    """Four warps, 16 x 8 x 16 each, at the rate of mma."""
    sass = SASS.replace("HGMMA.64x128x16", "HMMA.16816").format(
        under="", masks=_line("FSEL R1, R1, -INF , P0") * 8, after=""
    )
    (items,) = sass_model.parse(sass).values()
    row = sass_model.predict(sass_model.Kernel("k", sass_model.main_loop(items), 2, 1))
    assert (row["products"], row["tensor_clocks"]) == (2, round(2 * 2 * sass_model.MMA))
    assert row["clocks"] >= row["tensor_clocks"]


def test_a_prediction_names_what_binds():
    row = sass_model.predict(sass_model.Kernel("k", _loop(after=_line("MUFU.EX2 R3, R3") * 100), 3, 1))
    assert (row["bound_by"], row["tensor_clocks"], row["mufu_clocks"]) == ("MUFU", 384, 2400)
    assert row["loop_tflops"] == round(2 * 3 * 2 * 64 * 128 * 16 / row["clocks"] * 132 * 1.755 / 1000)


def test_the_predictions_name_every_kernel_of_the_model():
    rows = sass_model.read()
    assert list(rows[0]) == sass_model.COLUMNS
    names = " ".join(row["kernel"] for row in rows)
    for head_dim in (64, 128):
        for kernel in ("forward", "backward_key", "backward_query"):
            for release, kind in itertools.product(("3.6.0", "3.9.0"), ("plain", "causal")):
                assert f"triton {release} {kernel} D {head_dim} {kind}" in names
        for kind in ("full", "windowed"):
            assert f"cuda forward D {head_dim} {kind}" in names
        assert f"cuda backward D {head_dim}" in names and f"cuda mma forward D {head_dim}" in names
    for row in rows:
        assert 0 < float(row["loop_tflops"]) <= round(2 * 2048 * 132 * 1.755 / 1000)


def test_the_predictions_are_of_the_present_kernels():
    """After a change of a kernel or its tile: python benchmarks/sass_model.py --record, with nvcc and each Triton."""
    shape = configurations.Shape
    for row in sass_model.read():
        compiler, _, label = row["kernel"].partition(" ")
        assert row["sources"] == sass_model.sources_of(row["kernel"]), row["kernel"]
        if compiler == "triton":
            _, kernel, _, head_dim, _, tile = label.split()
            config = configurations.select(kernel, shape("sm_90", int(head_dim)))
            assert tile == f"{config.block_m}x{config.block_n}", row["kernel"]


def test_sources_are_compared_without_comments(tmp_path, monkeypatch):
    kernels = tmp_path / "kernels"
    kernels.mkdir()
    monkeypatch.setattr(sass_model, "ROOT", tmp_path)

    def written(common):
        (kernels / "attention_forward.py").write_text("from .common import f\nx = f(1)\n")
        (kernels / "common.py").write_text(common)
        return sass_model.sources_of("triton 3.6.0 forward D 64")

    plain = written("def f(x):\n    return x\n")
    assert written('def f(x):\n    """Says so."""\n    return x  # the same\n') == plain
    assert written("def f(x):\n    return 2 * x\n") != plain


def test_a_record_keeps_the_rows_of_other_compilers():
    def row(kernel, clocks):
        return {"kernel": kernel, "clocks": clocks}

    before = [
        row("cuda forward D 64", 1),
        row("triton 3.6.0 forward D 64", 2),
        row("triton 3.9.0 backward_key D 64", 3),
    ]
    merged = sass_model.merged(before, [row("triton 3.9.0 forward D 64", 4)])
    assert merged == [before[0], before[1], row("triton 3.9.0 forward D 64", 4)]
