"""Registers attn_implementation="transformer_fast", and the quantizer that reads int8 checkpoints, as soon as both
packages are imported, in either order.

`import transformer_fast` must not import transformers, which takes seconds. If transformers is loaded, registration is
immediate. If not, an import finder registers right after `transformers.modeling_utils` was executed.
"""

import importlib.abc
import importlib.util
import sys
import warnings

_WATCHED = "transformers.modeling_utils"


class _RegisterAfterImport(importlib.abc.MetaPathFinder):
    """Lets the other finders find the watched module, and adds a step after its execution."""

    def __init__(self) -> None:
        self._searching = False

    def find_spec(self, fullname, path=None, target=None):
        if fullname != _WATCHED or self._searching:
            return None
        self._searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module) -> None:
            execute(module)
            _register()

        # Set on the instance, so that the loader keeps its type, which inspect and importlib.resources check.
        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register() -> None:
    from .huggingface import register

    try:
        register()
        # Unregistered, transformers only warns, and takes the int8 numbers for the weights themselves.
        from ..models import _quantizer  # noqa: F401
    except ImportError as error:  # importing an old transformers must not fail
        warnings.warn(f'attn_implementation="transformer_fast" is not available: {error}', stacklevel=2)


def install() -> None:
    """Register now if transformers' modelling code is loaded, and again whenever it is loaded later."""
    if not any(isinstance(finder, _RegisterAfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterAfterImport())
    module = sys.modules.get(_WATCHED)
    spec = getattr(module, "__spec__", None)
    if module is not None and not getattr(spec, "_initializing", False):
        _register()
