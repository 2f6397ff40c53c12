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
FLAGS = ["-std=gnu++17", "-O1", "-g1", "-Wno-psabi", f"-I{ROOT / 'csrc'}"]
FLAGS += ["-fsanitize=address,undefined", "-fno-sanitize-recover"]


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no {COMPILER}")
def test_int8_products_in_tiles_have_the_bits_of_those_without(tmp_path):
    objects = [
        (SOURCES / "int8.cpp", "plain", []),
        (SOURCES / "int8.cpp", "tiles", ["-DTF_EMULATE_TILES"]),
        (SOURCES / "compare_int8.cpp", "compare", []),
    ]
    compilations = [
        subprocess.Popen([COMPILER, *FLAGS, f"-DTF_ISA={name}", *more, "-c", source, "-o", tmp_path / f"{name}.o"])
        for source, name, more in objects
    ]
    assert [c.wait() for c in compilations] == [0, 0, 0]
    program = tmp_path / "compare"
    subprocess.run([COMPILER, *FLAGS, *(tmp_path / f"{name}.o" for _, name, _ in objects), "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().endswith("0 failures")
