"""The sm_90a attention kernels must do their arithmetic while the tensor cores work. This is checked in the machine
code.

ptxas assumes that a wait for wgmma is free and may move it up past arithmetic. The results are then still right, but
nothing overlaps, and no test of values detects that.
"""

import importlib.util
import pathlib
import re
import shutil
import subprocess

import pytest

CSRC = pathlib.Path(__file__).resolve().parent.parent.parent / "csrc"


def _disassembler() -> str | None:
    spec = importlib.util.find_spec("triton")  # Triton's package contains one
    shipped = pathlib.Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm" if spec else None
    return shutil.which("nvdisasm") or (str(shipped) if shipped and shipped.exists() else None)


def _kernels(name: str, tmp_path: pathlib.Path) -> dict[str, str]:
    """The machine code of each kernel of a source file for sm_90a."""
    nvcc, disassembler = shutil.which("nvcc"), _disassembler()
    if not nvcc or not disassembler:
        pytest.skip("needs nvcc, and nvdisasm on PATH or in Triton's package")
    source, cubin = CSRC / "cuda" / name, tmp_path / "kernels.cubin"
    includes = [f"-I{CSRC}", f"-I{CSRC}/cuda"]
    subprocess.run([nvcc, "-std=c++17", "-O3", "-cubin", "-arch=sm_90a", *includes, source, "-o", cubin], check=True)
    sass = subprocess.run([disassembler, "-c", cubin], capture_output=True, text=True, check=True).stdout
    kernels = re.split(r"^\.text\.(\w+):", sass, flags=re.MULTILINE)
    return dict(zip(kernels[1::2], kernels[2::2]))


def test_softmax_runs_under_the_products(tmp_path):
    """Softmax runs while the products run. Before the next product there is only the rounding of P. O is rescaled
    during Q K^T or, if that is rare, in a branch of its own."""
    kernels = _kernels("attention_forward_wgmma.cu", tmp_path)
    assert len(kernels) == 8
    for name, code in kernels.items():
        dim, keys = map(int, re.search(r"Li(\d+)ELi\d+ELi(\d+)ELb", name).groups())
        lazy, turns = (flag == "1" for flag in re.search(r"ELb\dELb(\d)ELb(\d)E", name).groups())
        # From the point where the scores are ready to the wait for the other product.
        before, after = code.split("WARPGROUP.DEPBAR.LE gsb0, 0x1", 1)
        under = after.split("WARPGROUP.DEPBAR", 1)[0]
        assert "HGMMA" not in under, name
        # Exponentials per thread for 64 rows, and two for the factors of the sums.
        assert under.count("MUFU.EX2") == keys // 2 + 2, (name, under.count("MUFU.EX2"))
        # From the group's turn on the tensor cores, or without turns from the wait for the last product. The first
        # barrier is for the whole block.
        body = code.split("BAR.SYNC", 2)[2] if turns else before.rsplit("WARPGROUP.DEPBAR.LE gsb0, 0x0", 1)[1]
        before_scores, after = body.split("HGMMA", 1)
        under_scores = after.split("WARPGROUP.ARRIVE", 1)[0]
        assert before_scores.count("F2FP") <= keys // 4 and "MUFU" not in before_scores, name
        rescaled = 0 if lazy else dim // 2
        assert before_scores.count("FMUL") + under_scores.count("FMUL") <= rescaled + 1, name
        assert under_scores.count("HGMMA") == dim // 16 - 1 and under_scores.count("FMUL") >= rescaled - 4, name


def test_exponentials_run_under_dp_and_score_gradients_under_dv(tmp_path):
    kernels = {n: c for n, c in _kernels("attention_backward_wgmma.cu", tmp_path).items() if "HGMMA" in c}
    assert len(kernels) == 2 * 3
    for name, code in kernels.items():
        queries = int(re.search(r"Li\d+ELi(\d+)E", name)[1])
        # From the point where the scores are ready to the next product, dV: dP runs meanwhile.
        _, after = code.split("WARPGROUP.DEPBAR.LE gsb0, 0x1", 1)
        under_dp, after = after.split("HGMMA", 1)
        assert "WARPGROUP.DEPBAR" not in under_dp, name
        assert under_dp.count("MUFU.EX2") == queries // 2, (name, under_dp.count("MUFU.EX2"))  # a thread's share
        # From the point where dP is ready to the product after dV, dQ, and the barrier before it: dV runs meanwhile.
        _, after = after.split("WARPGROUP.DEPBAR.LE gsb0, 0x1", 1)
        under_dv = after.split("HGMMA", 1)[0]
        assert "WARPGROUP.DEPBAR" not in under_dv and under_dv.count("BAR.SYNC") == 1, name
        assert under_dv.count("F2FP") == queries // 4 and under_dv.count("STSM") == queries // 16, name
