"""The demo: a real BERT on real sentences, with Hugging Face's model and with this package's."""

import importlib as _importlib

from .checkpoint import CheckpointMissing, load_sentences, locate

__all__ = ["CheckpointMissing", "DemoResult", "load_sentences", "locate", "run"]


def __getattr__(name: str):
    if name in ("DemoResult", "run"):  # these need rich; the checkpoint does not
        return getattr(_importlib.import_module(".main", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
