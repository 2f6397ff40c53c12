"""setup.py: which torch it builds against, what it does without torch, and how it tags a wheel."""

import os
import pathlib
import platform
import re
import runpy
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
HASH = "transformer_fast/backends/source_hash.py"
LIBRARY = ROOT / "transformer_fast" / "_C.abi3.so"

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="setup.py lies only in a checkout")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the sources without build outputs."""
    folder = tmp_path_factory.mktemp("tree")
    for name in ("transformer_fast", "kernels", "benchmarks", "csrc"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__", "results", "_native_missing.txt")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def _setup(tree, *arguments, **environment):
    command = [sys.executable, "setup.py", "-q", *arguments]
    return subprocess.run(
        command, cwd=tree, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "", **environment}
    )


def _ask(code: str, folder, executable: str = sys.executable, **environment):
    code = f"import runpy; tools = runpy.run_path('setup.py')\n{code}"
    return subprocess.run(
        [executable, "-c", code], cwd=folder, capture_output=True, text=True, env={**os.environ, **environment}
    )


@pytest.fixture
def isolated(tmp_path):
    """A PYTHONPATH as in pip's build isolation, which hides the packages of the environment itself."""
    site = tmp_path / "isolated"
    site.mkdir()
    installed = pathlib.Path(__import__("setuptools").__file__).parent.parent
    for path in installed.glob("*"):
        if path.name.startswith(("setuptools", "_distutils_hack", "packaging", "wheel")):
            (site / path.name).symlink_to(path)
    (site / "sitecustomize.py").write_text(
        f"import sys\nsys.path[:] = [path for path in sys.path if path != {str(installed)!r}]\n"
    )
    return site


def test_the_users_torch_is_found_behind_build_isolation(tree, isolated):
    code = (
        "try: import torch\n"
        "except ModuleNotFoundError: print('hidden')\n"
        "else: print('visible')\n"
        "print(tools['find_torch']().folder)"
    )
    done = _ask(code, tree, PYTHONPATH=str(isolated))
    assert done.returncode == 0, done.stderr
    torch = pathlib.Path(__import__("torch").__file__).parent
    assert done.stdout.splitlines() == ["hidden", str(torch)]


@pytest.fixture
def bare(tmp_path):
    """The interpreter of an empty environment."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    return str(tmp_path / "bare" / "bin" / "python")


def test_without_torch_the_build_stops_and_says_the_command(tree, isolated, bare):
    done = _ask("tools['find_torch']()", tree, bare, PYTHONPATH=str(isolated))
    assert done.returncode != 0 and f"    pip install torch && pip install {tree}\n" in done.stderr
    assert "this build sees none. The command" in done.stderr


@pytest.mark.parametrize("broken", ["raise ImportError('libfoo.so: not found')", "__version__ = '2.1.0'"])
def test_a_torch_that_cannot_serve_is_named(broken, tree, isolated, bare):
    (isolated / "torch.py").write_text(f"import types\ncuda = types.SimpleNamespace(is_available=bool)\n{broken}\n")
    done = _ask("tools['find_torch']()", tree, bare, PYTHONPATH=str(isolated))
    assert done.returncode != 0
    wanted = "libfoo.so: not found" if "raise" in broken else "needs torch >= 2.11, and "
    assert wanted in done.stderr


@pytest.mark.parametrize(
    "environment, reason",
    [({"CXX": "no-such-compiler"}, "no C++ compiler (no-such-compiler)"), ({"TRANSFORMER_FAST_NATIVE": "0"}, "=0")],
)
def test_a_wheel_without_the_library_is_a_pure_one_and_says_why(environment, reason, tree, tmp_path):
    done = _setup(tree, "bdist_wheel", "--dist-dir", str(tmp_path), **environment)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        assert not any(".so" in name for name in names) and "transformer_fast/kernels/norm.py" in names
        assert reason in file.read("transformer_fast/_native_missing.txt").decode()


def test_a_source_distribution_builds_the_same_library(tree, tmp_path):
    """It has every source that the library is built from, and none that would make another hash of them."""
    done = _setup(tree, "sdist", "--dist-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path)
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert (folder / "kernels" / "norm.py").exists() and not (folder / "tests").exists()
    hashes = [runpy.run_path(str(root / HASH))["source_hash"](root) for root in (folder, tree)]
    assert hashes[0] == hashes[1]


def test_a_build_that_must_not_fail(tree, tmp_path):
    done = _setup(tree, "bdist_wheel", "--dist-dir", str(tmp_path), CXX="no-such-compiler", TRANSFORMER_FAST_NATIVE="1")
    assert done.returncode != 0 and "TRANSFORMER_FAST_NATIVE=1, but there was no C++ compiler" in done.stderr
    assert not list(tmp_path.glob("*.whl"))


def test_a_failed_compilation_is_noted(tree, tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho 'error: too old' >&2\nexit 1\n")
    compiler.chmod(0o755)
    done = _setup(tree, "bdist_wheel", "--dist-dir", str(tmp_path), CXX=str(compiler))
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as file:
        note = file.read("transformer_fast/_native_missing.txt").decode()
    assert "its build failed" in note and "build again with TRANSFORMER_FAST_NATIVE=1" in note


@pytest.mark.skipif(not LIBRARY.exists() or platform.machine() != "x86_64", reason="no library for x86-64 was built")
def test_the_library_runs_on_older_systems_and_hides_what_it_brings():
    """The library needs at most glibc 2.28, as torch's own wheels."""
    newest = max(int(minor) for minor in re.findall(rb"GLIBC_2\.(\d+)", LIBRARY.read_bytes()))
    assert newest <= 28, f"it asks for glibc 2.{newest}"
    if shutil.which("nm"):
        exported = subprocess.run(["nm", "-D", "--defined-only", LIBRARY], capture_output=True, text=True, check=True)
        assert not {"exp", "log", "__libc_single_threaded"} & set(exported.stdout.split())


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors have one instruction set")
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_instruction_sets_that_the_compiler_lacks_are_left_out(tree, tmp_path):
    older = tmp_path / "older-g++"
    refuse = 'case "$*" in *-mamx-tile*|*-mavxvnni*) echo "unrecognized option" >&2; exit 1;; esac'
    older.write_text(f'#!/bin/sh\n{refuse}\nexec g++ "$@"\n')
    older.chmod(0o755)
    ask = "print(*tools['isas'](), '/', *tools['isas'](int8=True))"
    done = _ask(ask, tree, CXX=str(older))
    assert done.stdout.strip() == "baseline avx2 avx512 avx512_bf16 / baseline avx2 avx512 avx512_vnni"
    assert "built without an instruction set that the compiler lacks: unrecognized option" in done.stderr
    assert "avx512_amx / " in _ask(ask, tree, CXX="g++").stdout
