"""Kernels that multiply matrix tiles (AMX), compiled with emulated tiles: they run on every machine, and
AddressSanitizer sees what a tile reads and writes."""

import os
import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SOURCES = pathlib.Path(__file__).resolve().parent / "tiles"
COMPILER = os.environ.get("CXX", "g++").split()[0]
FLAGS = ["-std=gnu++17", "-O1", "-g1", "-Wno-psabi", "-fno-sanitize-recover", f"-I{ROOT / 'csrc'}"]

pytestmark = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no {COMPILER}")


def build_and_run(folder: pathlib.Path, sanitizers: str, sources: list[tuple[str, str, list[str]]]) -> None:
    """Link objects of (source, value of TF_ISA, more flags) and expect the program to find no failure."""
    flags = [*FLAGS, f"-fsanitize={sanitizers}"]
    compilations = [
        subprocess.Popen(
            [COMPILER, *flags, f"-DTF_ISA={name}", *more, "-c", SOURCES / source, "-o", folder / f"{name}.o"]
        )
        for source, name, more in sources
    ]
    assert [c.wait() for c in compilations] == [0] * len(sources)
    program = folder / "compare"
    subprocess.run([COMPILER, *flags, *(folder / f"{name}.o" for _, name, _ in sources), "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().endswith(" 0 failures")


def test_int8_products_in_tiles_have_the_bits_of_those_without(tmp_path):
    plain, tiles = ("int8.cpp", "plain", []), ("int8.cpp", "tiles", ["-DTF_EMULATE_TILES"])
    build_and_run(tmp_path, "address,undefined", [plain, tiles, ("compare_int8.cpp", "compare", [])])


def test_attention_in_tiles_errs_by_its_roundings_alone(tmp_path):
    tiles = ("attention.cpp", "tiles", ["-DTF_EMULATE_TILES"])
    build_and_run(tmp_path, "address", [tiles, ("compare_attention.cpp", "compare", [])])


def test_few_rows_in_tiles_err_by_the_rounding_of_the_result(tmp_path):
    tiles = ("linear.cpp", "tiles", ["-DTF_EMULATE_TILES"])
    build_and_run(tmp_path, "address,undefined", [tiles, ("compare_linear.cpp", "compare", [])])
