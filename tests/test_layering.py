"""Imports point down: cli, integrations > quantization > models > generation > layers > ops > backends > kernels."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "transformer_fast"
FLOORS = ["kernels", "backends", "ops", "distributed", "layers", "generation", "models", "quantization", "integrations"]
TOP = len(FLOORS)  # cli, demo, verify: they may use everything


def _floor(module: str) -> int:
    return FLOORS.index(module) if module in FLOORS else TOP


def _imports(path: pathlib.Path, package: list[str]):
    """The dotted names that a file imports; relative ones are made absolute."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


FILES = [p for folder in ("transformer_fast", "kernels") for p in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.quick
@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "kernels":
        parts = ["transformer_fast", *parts]
    if parts == ["transformer_fast", "__init__"]:
        return  # the public names
    floor = _floor(parts[1])
    for name in _imports(path, parts[:-1]):
        target = name.split(".")
        if target[0] != "transformer_fast" or len(target) < 2:
            continue
        if target[1] in ("_version", "_transformers", "backend", "explain", "info") and floor > 1:
            continue
        assert _floor(target[1]) <= floor, f"{path.name} ({parts[1]}) imports {name} from a higher floor"


@pytest.mark.quick
def test_families_do_not_import_each_other():
    families = [p for p in (PACKAGE / "models").glob("*.py") if p.stem not in ("__init__", "auto", "registry")]
    shared = {"registry", "loading"}
    for path in families:
        for name in _imports(path, ["transformer_fast", "models"]):
            target = name.split(".")
            if target[:2] == ["transformer_fast", "models"] and len(target) > 2:
                other = target[2]
                is_family = (PACKAGE / "models" / f"{other}.py").exists() and not other.startswith("_")
                assert not is_family or other in shared or other == path.stem, f"{path.name} imports {name}"


@pytest.mark.quick
def test_kernels_know_neither_autograd_nor_modules():
    for path in (ROOT / "kernels").glob("*.py"):
        text = path.read_text()
        assert "torch.autograd" not in text and "torch.nn" not in text, path.name


@pytest.mark.quick
def test_layout():
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow Hugging Face's package of that name"
    assert not (ROOT / "conftest.py").exists() and not list((ROOT / "tests").rglob("__init__.py"))


# Code that kernels share and that belongs to no op: processor features, distribution of work, tables of kernels.
_SHARED = {
    "csrc/cpu": {
        "column_sums", "content_hash", "int8_rows", "int8_tiles", "kernels", "kernels_int8", "parallel", "philox",
        "simd", "step_products", "table", "table_int8", "team", "tiles",
    },
    "csrc/cuda": {
        "column_sum", "descriptor", "philox", "ptx", "ptx_sm90", "ptx_wgmma", "simt", "stream", "swizzle", "tensor_map",
        "vector",
    },
    "csrc/bindings": {"check", "content_hash", "cuda", "cuda_counters", "matrix"},
    "kernels": {"column_sum", "direct", "philox"},
}  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("folder", list(_SHARED))
def test_kernels_bear_the_name_of_their_op(folder):
    """A kernel file is named after the file of its op in ops/, so that `find . -name '*norm*'` finds all parts of an
    op."""
    ops = {path.stem for path in (PACKAGE / "ops").glob("[a-z]*.py")}
    files = {p.stem for p in (ROOT / folder).iterdir() if p.suffix in (".py", ".cpp", ".hpp", ".cu", ".cuh")}
    unknown = {
        stem for stem in files - _SHARED[folder]
        if not any(f"{stem.removeprefix('cuda_')}_".startswith(f"{op}_") for op in ops)
    }  # fmt: skip
    assert not unknown, f"{folder}: no file in transformer_fast/ops is named as {sorted(unknown)}"
    assert _SHARED[folder] <= files, "the list above names files that are gone"


@pytest.mark.quick
def test_tests_of_kernels_bear_the_name_of_their_op():
    ops = {path.stem for path in (PACKAGE / "ops").glob("[a-z]*.py")}
    of_kernels = {p.stem for end in ("cpu", "cuda", "triton") for p in (ROOT / "tests/ops").glob(f"test_*_{end}.py")}
    of_kernels.discard("test_launches_triton")  # of every op
    astray = {stem for stem in of_kernels if not any(stem.startswith(f"test_{op}_") for op in ops)}
    assert of_kernels and not astray, f"no file in transformer_fast/ops is named as {sorted(astray)}"
