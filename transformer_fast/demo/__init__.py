"""The demo: a real BERT on real sentences, with Hugging Face's model and with this package's."""

from .checkpoint import CheckpointMissing
from .main import DemoResult, run

__all__ = ["CheckpointMissing", "DemoResult", "run"]
