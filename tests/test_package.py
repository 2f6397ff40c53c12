"""The installed package: what it imports, how long that takes, and that it does not interfere with other packages."""

import os
import pathlib
import runpy
import shutil
import subprocess
import sys

import pytest

import transformer_fast as tf
from transformer_fast.backends import native

ROOT = pathlib.Path(__file__).resolve().parent.parent


def _python(code: str, cwd=None, **env) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env={**os.environ, **env}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.quick
def test_import_is_light():
    code = (
        "import torch, sys, time; t = time.process_time(); import transformer_fast; "
        "transformer_fast.layer_norm; s = time.process_time() - t; "
        "print(s, [m for m in ('transformers', 'triton.compiler', 'matplotlib', 'typer') if m in sys.modules])"
    )
    best = min((_python(code).split(" ", 1) for _ in range(3)), key=lambda r: float(r[0]))
    assert best[1] == "[]"
    assert float(best[0]) < 3.0  # CPU seconds: about 0.1 on a quiet machine, more if transformers were imported


@pytest.mark.quick
def test_every_public_name_is_there():
    for name in tf.__all__:
        assert getattr(tf, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        tf.no_such_name  # noqa: B018


@pytest.mark.parametrize("hf_kernels", [False, True])
def test_transformers_imports_from_the_checkout(hf_kernels, tmp_path):
    """Hugging Face looks for a package named `kernels`. The folder of that name here must not be mistaken for it."""
    extra = ""
    if hf_kernels:  # a stand-in for the installed package, which comes before the checkout on sys.path
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / "__init__.py").write_text("__version__ = '0.1.0'\nmarker = 'hugging face'\n")
        extra = f"import sys; sys.path.insert(1, {str(tmp_path)!r}); import kernels; assert kernels.marker; "
    code = extra + "from transformers import BertModel; import transformer_fast; print(BertModel.__name__)"
    assert _python(code, cwd=ROOT) == "BertModel"


def test_kernels_are_found_in_a_bare_checkout():
    code = "import transformer_fast, importlib.util as u; print(u.find_spec('transformer_fast.kernels') is not None)"
    assert _python(code, cwd=ROOT, PYTHONPATH=str(ROOT)) == "True"


@pytest.mark.parametrize("note", ["", "there was no C++ compiler (g++) when transformer_fast was installed"])
def test_works_without_its_native_library(note, tmp_path):
    """With only the Python files everything runs in plain PyTorch, and info and one warning say why."""
    shutil.copytree(
        ROOT / "transformer_fast", tmp_path / "transformer_fast",
        ignore=shutil.ignore_patterns("*.so", "__pycache__", "_native_missing.txt"),
    )  # fmt: skip
    if note:
        (tmp_path / "transformer_fast" / "_native_missing.txt").write_text(note + "\n")
    code = (
        "import warnings, torch; warnings.simplefilter('always'); held = warnings.catch_warnings(record=True); "
        "said = held.__enter__(); import transformer_fast as tf; x = torch.randn(3, 8, requires_grad=True); "
        "print(tf.__file__); print(tf.info()['native CPU kernels']); print(len(said)); "
        "tf.layer_norm(x.double(), 8); print(len(said)); "
        "tf.add_layer_norm(x, x)[0].sum().backward(); q = torch.randn(1, 2, 4, 8); "
        "y = tf.scaled_dot_product_attention(q, q, q); "
        "torch.testing.assert_close(y, torch.nn.functional.scaled_dot_product_attention(q, q, q)); "
        "print(len(said)); print(said[0].message)"
    )
    where, status, before, double, after, said = _python(code, cwd=tmp_path, PYTHONPATH=str(tmp_path)).splitlines()
    reason = note or "this copy of transformer_fast has none; reinstall it where torch and a C++ compiler are available"
    assert where.startswith(str(tmp_path)) and status.startswith(f"missing: {reason}. They would bring")
    assert (before, double, after) == ("0", "0", "1"), "one warning, of the first call that kernels would have taken"
    assert said == f"transformer_fast runs in plain PyTorch, without its CPU kernels: {reason}"


def test_works_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n.split('.')[0] == 'triton' else find(n, *a)\n"
        "import torch, transformer_fast as tf\n"
        "torch.cuda.is_available = lambda: False\n"
        "print(tf.layer_norm(torch.randn(2, 8), 8).shape); print(tf.info()['Triton kernels'])"
    )
    assert "idle: no NVIDIA GPU is visible" in _python(code)


def test_forced_backend_by_environment():
    code = (
        "import torch, transformer_fast as tf; from transformer_fast.backends import Call, select; "
        "print(select(Call('norm', 'cpu', torch.float32, 8)).name)"
    )
    assert _python(code, TRANSFORMER_FAST_BACKEND="eager") == "eager"


@pytest.mark.quick
@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="setup.py lies only in a checkout")
def test_the_native_library_is_there():
    """Without it the tests of its kernels are skipped, so a failed build must not go unnoticed."""
    why_not_built = runpy.run_path(str(ROOT / "setup.py"))["without_library"]()
    if why_not_built:
        pytest.skip(why_not_built)
    assert native.load() == ""


@pytest.mark.parametrize("isa", [*([] if native.load() else native.supported_isas()), "nonsense"])
def test_forced_instruction_set(isa):
    code = "from transformer_fast.backends import native; native.load(); print(native.current_isa())"
    if isa == "nonsense":
        with pytest.raises(AssertionError, match="TRANSFORMER_FAST_CPU_ISA='nonsense': must be one of"):
            _python(code, TRANSFORMER_FAST_CPU_ISA=isa)
    elif native.load() == "":
        assert _python(code, TRANSFORMER_FAST_CPU_ISA=isa) == isa


@pytest.mark.skipif(bool(native.load()), reason=f"no native library: {native.load()}")
def test_a_library_without_an_op_that_is_asked_for(monkeypatch):
    """A library from older sources is not used, and the message says what to do."""

    def set_isa(name):
        raise AttributeError("'_OpNamespace' object has no attribute 'cpu_int8_isas'")

    monkeypatch.setattr(native, "set_isa", set_isa)
    monkeypatch.setattr(native, "stale", lambda: "it was built from other sources; build it again")
    assert native.load.__wrapped__() == "it was built from other sources; build it again"
    monkeypatch.setattr(native, "stale", lambda: "")
    with pytest.raises(AttributeError, match="cpu_int8_isas"):
        native.load.__wrapped__()


@pytest.mark.skipif(bool(native.load()), reason=f"no native library: {native.load()}")
def test_a_library_of_other_sources_is_noticed(tmp_path):
    """In a checkout whose sources have changed since the build. A wheel has no sources."""
    for folder in ("csrc", "transformer_fast"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "setup.py", tmp_path)
    code = (
        "import transformer_fast as tf; print(tf.__file__, tf.info()['native CPU kernels']); tf.backends.native.load()"
    )

    def run():
        done = subprocess.run(
            [sys.executable, "-W", "always", "-c", code], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0 and done.stdout.startswith(str(tmp_path)) and "active" in done.stdout, done.stderr
        return done.stderr.count("RuntimeWarning"), done.stderr

    same = native.stale() == ""
    assert run()[0] == (not same)
    with (tmp_path / "csrc" / "cpu" / "norm.cpp").open("a") as f:
        f.write("// changed\n")
    count, said = run()
    assert count == 1 and f"cd {tmp_path} && python setup.py build_ext --inplace" in said
    shutil.rmtree(tmp_path / "csrc")
    assert run()[0] == 0
