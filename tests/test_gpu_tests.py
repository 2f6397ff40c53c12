"""Finds errors in the GPU tests without a GPU: tensors that are created on the wrong device."""

import ast
import pathlib

import pytest

pytestmark = pytest.mark.quick
FILES = sorted((pathlib.Path(__file__).resolve().parent / "ops").glob("test_*.py"))
FACTORIES = {"arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "tensor", "zeros"}
MOVES = {"to", "cuda", "tolist", "item"}


def _tests_on_a_device(tree: ast.Module):
    """Test functions with a `device` argument, except those that skip on a GPU."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or _skips_the_gpu(node):
            continue
        if "device" in {a.arg for a in (*node.args.args, *node.args.kwonlyargs)}:
            yield node


def _skips_the_gpu(function: ast.FunctionDef) -> bool:
    tests = (node for node in ast.walk(function) if isinstance(node, ast.If))
    return any("cuda" in ast.dump(node.test) and "skip" in ast.dump(node.body[0]) for node in tests)


def _beside_the_device(function: ast.FunctionDef) -> list[int]:
    """The lines that create a tensor without a device and do not move it."""
    moved, found = set(), []
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MOVES:
            moved |= {id(inner) for inner in ast.walk(node.func.value)}
        if isinstance(node, (ast.If, ast.IfExp)) and "device" in ast.dump(node.test):
            moved |= {id(inner) for inner in ast.walk(node)}  # code for only one kind of device
    for node in ast.walk(function):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in FACTORIES):
            continue
        of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
        placed = any(keyword.arg in ("device", "generator", None) for keyword in node.keywords)
        if of_torch and not placed and id(node) not in moved:
            found.append(node.lineno)
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_tensors_are_made_on_the_device(file):
    wrong = {f.name: lines for f in _tests_on_a_device(ast.parse(file.read_text())) if (lines := _beside_the_device(f))}
    assert not wrong


def test_sees_a_tensor_that_is_made_beside_the_device():
    source = """
def test_one(device):
    x = torch.randn(3, device=device)
    y = torch.randn(3).half().to(device)
    check(x, y, torch.randn(40, 2, 32))
"""
    (function,) = _tests_on_a_device(ast.parse(source))
    assert _beside_the_device(function) == [5]


def _marked_beside_a_fixture_of_devices(tree: ast.Module) -> list[str]:
    """Tests with the gpu mark in a file whose fixtures run every test on each device. On a GPU machine they would also
    run on the CPU."""
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    every = [f for f in functions if any("autouse" in ast.dump(d) for d in f.decorator_list)]
    if not any("device" in {a.arg for a in fixture.args.args} for fixture in every):
        return []
    return [f.name for f in functions if any("attr='gpu'" in ast.dump(d) for d in f.decorator_list)]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_is_marked_for_the_gpu_runs_there_alone(file):
    assert not _marked_beside_a_fixture_of_devices(ast.parse(file.read_text()))


def test_sees_a_marked_test_beside_a_fixture_of_devices():
    source = """
@pytest.fixture(autouse=True)
def _machine(device):
    yield

@pytest.mark.gpu
def test_one():
    pass
"""
    assert _marked_beside_a_fixture_of_devices(ast.parse(source)) == ["test_one"]
