"""For models that are not this package's classes: Hugging Face's attention interface, and `accelerate`."""

import importlib as _importlib

_EXPORTS = {
    "acceleration": ["Report", "accelerate", "restore"],
    "explain": ["explain"],
    "huggingface": ["register"],
}
_WHERE = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = sorted(_WHERE)


def __getattr__(name: str):
    if name in _WHERE:
        return getattr(_importlib.import_module(f".{_WHERE[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
