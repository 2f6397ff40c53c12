"""The Triton kernels of the flight kit: compiled without a GPU, moved to another folder, and found there."""

import importlib.util
import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
import torch
from scripts import load_script

ROOT = pathlib.Path(__file__).resolve().parent.parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


flight, flight_cache, flight_kit = (
    load_script(ROOT / "benchmarks" / f"{name}.py") for name in ("flight", "flight_cache", "flight_kit")
)


def _fill(folder: pathlib.Path, only: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "benchmarks" / "flight_cache.py"), "--output", str(folder), "--only", only]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_kernel_is_compiled_once_and_found_elsewhere(tmp_path):
    here, there, kit = tmp_path / "here", tmp_path / "there", tmp_path / "kit.tar.xz"
    work = "bench decode/bf16-b1-s128"  # in a CUDA graph
    compiled = int(re.search(r"(\d+) kernels were compiled", _fill(here, work))[1])
    assert compiled == 2 == flight_kit.pack_kernels(here, kit)  # the parts, and their sum
    flight.unpack_kernels(kit, there)
    keys = flight.kernels(here)
    shutil.rmtree(here)
    assert flight.kernels(there) == keys and len(keys) == 2
    assert "\n0 kernels were compiled" in _fill(there, work)
    assert flight.kernels(there) == keys


@pytest.mark.quick
def test_what_asks_for_a_gpu_gets_cpu_tensors():
    with flight_cache.OnTheCpu():
        made = [
            torch.randn(3, 4, device="cuda"),
            torch.randn((3, 4), device=torch.device("cuda", 0)),
            torch.zeros(3, 4).cuda(),
            torch.zeros(3, 4).to("cuda"),
            torch.zeros(3, 4).to("cuda", torch.float32),
            torch.tensor([[1.0] * 4] * 3, device="cuda:0"),
            torch.arange(12.0, device="cuda").view(3, 4),
        ]
    assert all(t.device.type == "cpu" and t.shape == (3, 4) for t in made)


@pytest.mark.quick
@needs_triton
def test_the_key_of_another_python_s_triton(monkeypatch):
    from triton.runtime import cache

    own = flight_cache.library_hash(pathlib.Path(importlib.util.find_spec("triton").origin).parent)
    key = cache.triton_key()
    monkeypatch.setattr(cache, "triton_key", cache.triton_key)
    flight_cache.for_another_python(own, "f" * 64)
    assert own in key and cache.triton_key() == key.replace(own, "f" * 64)
    with pytest.raises(RuntimeError, match="hash of libtriton"):
        flight_cache.for_another_python(own, "e" * 64)


def _wheel(path: pathlib.Path, **changed) -> pathlib.Path:
    files = {"triton/compiler/code.py": "a", "triton/backends/ptxas": "b", flight_kit.LIBRARY: "c", "triton/x.py": "d"}
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in (files | changed).items():
            wheel.writestr(name, text)
    return path


@pytest.mark.quick
def test_wheels_may_differ_in_the_library_alone(tmp_path):
    ours = _wheel(tmp_path / "ours.whl")
    theirs = _wheel(tmp_path / "theirs.whl", **{flight_kit.LIBRARY: "other", "triton/x.py": "not part of the key"})
    assert flight_kit.library_hash(ours, theirs) == flight_cache.hashlib.sha256(b"other").hexdigest()
    changed = _wheel(tmp_path / "changed.whl", **{"triton/backends/ptxas": "newer"})
    with pytest.raises(ValueError, match="ptxas"):
        flight_kit.library_hash(ours, changed)


@pytest.mark.quick
def test_only_kernels_are_unpacked_and_only_once(tmp_path):
    archive, cache = tmp_path / "kit.tar.xz", tmp_path / "deep" / "cache"
    names = ["KEY/_a_kernel.json", "KEY/_a_kernel.cubin", "../KEY/b.json", "../KEY/b.cubin", "KEY/c.sh"]
    with tarfile.open(archive, "w:gz") as tar:
        for name in names:
            entry = tarfile.TarInfo(name)
            entry.size = len(name)
            tar.addfile(entry, io.BytesIO(name.encode()))
    flight.unpack_kernels(archive, cache)
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == [
        "__grp___a_kernel.json", "_a_kernel.cubin", "_a_kernel.json", "kit.tar.xz",
    ]  # fmt: skip
    paths = json.loads((cache / "KEY" / "__grp___a_kernel.json").read_text())["child_paths"]
    assert {name: pathlib.Path(path).read_text() for name, path in paths.items()} == {
        name: f"KEY/{name}" for name in ("_a_kernel.json", "_a_kernel.cubin")
    }
    (cache / "KEY" / "_a_kernel.cubin").write_text("newer")
    flight.unpack_kernels(archive, cache)
    assert (cache / "KEY" / "_a_kernel.cubin").read_text() == "newer"
