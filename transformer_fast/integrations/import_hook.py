"""attn_implementation="transformer_fast" is there as soon as both packages are imported, in either order.

`import transformer_fast` must not import transformers, which takes seconds. So where transformers is not loaded yet,
a finder waits for `transformers.modeling_utils` and registers right after it has run; where it is, at once.
"""

import importlib.abc
import importlib.util
import sys
import warnings

_WATCHED = "transformers.modeling_utils"


class _RegisterAfterImport(importlib.abc.MetaPathFinder):
    """Finds nothing itself: lets the other finders find the watched module and adds a step after its execution."""

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

        # On the instance: the loader keeps its type, so inspect and importlib.resources see what they expect.
        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register() -> None:
    from .huggingface import register

    try:
        register()
    except ImportError as error:  # an old transformers must still import
        warnings.warn(f'attn_implementation="transformer_fast" is not available: {error}', stacklevel=2)


def install() -> None:
    """Register now if transformers' modelling code is loaded; and whenever it is loaded (again) from here on."""
    if not any(isinstance(finder, _RegisterAfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterAfterImport())
    module = sys.modules.get(_WATCHED)
    spec = getattr(module, "__spec__", None)
    if module is not None and not getattr(spec, "_initializing", False):
        _register()
