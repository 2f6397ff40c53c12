"""Loads a Python file that is no part of a package: a benchmark, an example, a script of the tests."""

import importlib.util
import pathlib
from types import ModuleType

__all__ = ["load_script"]


def load_script(path: pathlib.Path) -> ModuleType:
    """A new module with the content of `path`, which does not get into sys.modules."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
