"""That the sm_90a attention forward does its softmax while the tensor cores work: read off its machine code.

ptxas takes a wait for wgmma to be free and moves it up over arithmetic, after which the results are right and nothing
runs at once. No test of values sees that.
"""

import importlib.util
import pathlib
import re
import shutil
import subprocess

import pytest

CSRC = pathlib.Path(__file__).resolve().parent.parent.parent / "csrc"


def _disassembler() -> str | None:
    spec = importlib.util.find_spec("triton")  # it ships one
    shipped = pathlib.Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm" if spec else None
    return shutil.which("nvdisasm") or (str(shipped) if shipped and shipped.exists() else None)


def test_softmax_runs_under_the_products(tmp_path):
    nvcc, disassembler = shutil.which("nvcc"), _disassembler()
    if not nvcc or not disassembler:
        pytest.skip("needs nvcc, and nvdisasm on PATH or in Triton's package")
    source, cubin = CSRC / "cuda" / "attention_forward_wgmma.cu", tmp_path / "kernels.cubin"
    includes = [f"-I{CSRC}", f"-I{CSRC}/cuda"]
    subprocess.run([nvcc, "-std=c++17", "-O3", "-cubin", "-arch=sm_90a", *includes, source, "-o", cubin], check=True)
    sass = subprocess.run([disassembler, "-c", cubin], capture_output=True, text=True, check=True).stdout
    kernels = re.split(r"^\.text\.(\w+):", sass, flags=re.MULTILINE)
    assert len(kernels) == 1 + 2 * 8
    for name, code in zip(kernels[1::2], kernels[2::2]):
        keys = int(re.search(r"Li\d+ELi\d+ELi(\d+)ELb", name)[1])
        # From where the scores are there to where the other product is waited for.
        _, after = code.split("WARPGROUP.DEPBAR.LE gsb0, 0x1", 1)
        under = after.split("WARPGROUP.DEPBAR", 1)[0]
        assert "HGMMA" not in under, name
        assert under.count("MUFU.EX2") >= keys // 2, (name, under.count("MUFU.EX2"))  # a thread's share of 64 rows
