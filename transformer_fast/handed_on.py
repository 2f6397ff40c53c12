"""Passes names of transformers through that this package does not define, and explains names that transformers removed.

So `from transformers import X, Y` also works with this package's name. transformers is imported only when the first
such name is used.
"""

import difflib
import sys

from ._version import TRANSFORMERS, old_transformers

__all__ = ["find", "import_error", "is_ours", "names"]

# Names that transformers 5 removed, and their replacements. `_today` handles names by rule (TF*, Flax*, ...).
_GONE = {
    "AdamW": "torch.optim.AdamW",
    "AutoModelForVision2Seq": "AutoModelForImageTextToText",
    "AutoModelWithLMHead": "AutoModelForCausalLM, AutoModelForMaskedLM or AutoModelForSeq2SeqLM",
    "BeamScorer": "generate(num_beams=...)",
    "BeamSearchScorer": "generate(num_beams=...)",
    "ConstrainedBeamSearchScorer": "generate(num_beams=...); constraints are no longer there",
    "DataCollatorForSOP": "sentence_pairs, which makes pairs for sentence order prediction",
    "DataCollatorForWholeWordMask": "DataCollatorForLanguageModeling(whole_word_mask=True)",
    "GlueDataset": "the package datasets",
    "HybridCache": "StaticCache",
    "LineByLineTextDataset": "the package datasets",
    "LogitsWarper": "LogitsProcessor",
    "MODEL_FOR_VISION_2_SEQ_MAPPING": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "MODEL_WITH_LM_HEAD_MAPPING": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "OffloadedCache": "DynamicCache(offloading=True)",
    "OffloadedStaticCache": "StaticCache(offloading=True)",
    "SlidingWindowCache": "StaticCache",
    "SpecialTokensMixin": "PreTrainedTokenizerBase",
    "SquadDataset": "the package datasets",
    "TextDataset": "the package datasets",
    "TextDatasetForNextSentencePrediction": "sentence_pairs",
    "Wav2Vec2Tokenizer": "Wav2Vec2CTCTokenizer",
    "create_optimizer": "torch.optim.AdamW and get_scheduler",
    "is_flax_available": "nothing: transformers 5 only has PyTorch models",
    "is_safetensors_available": "nothing: safetensors is always there",
    "is_tf_available": "nothing: transformers 5 only has PyTorch models",
    "is_torch_tpu_available": "is_torch_xla_available",
    "prune_layer": "prune_linear_layer of transformers.pytorch_utils",
}
_ENDINGS = {"FeatureExtractor": "ImageProcessor", "TokenizerFast": "Tokenizer", "ImageProcessorFast": "ImageProcessor"}


def is_ours(thing) -> bool:
    """Whether a class, a model or a function is defined in this package and not passed through from transformers.

    Args:
        thing: a class, a function, or an object, for which its class is checked.

    Returns:
        True if `thing` is defined in this package. False for subclasses defined elsewhere, as these may have their own
        forward.

    Examples:
        >>> import transformer_fast
        >>> transformer_fast.is_ours(transformer_fast.BertModel), transformer_fast.is_ours(transformer_fast.Trainer)
        (True, False)
    """
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{named.__module__}.".startswith(f"{__package__}.")


def import_error(name: str, error: ImportError) -> ImportError:
    """The error for `name` of this package where another package is missing or too old: says what to install."""
    package = (error.name or "").partition(".")[0]
    if package == "transformers" and (old := old_transformers()):
        return ImportError(f"{name}: {old}", name=error.name)
    if not isinstance(error, ModuleNotFoundError) or package in ("", __package__):
        return error
    what = repr(TRANSFORMERS) if package in ("transformers", "tokenizers", "safetensors") else package
    text = f"{__package__}.{name} needs {package}, which is not installed: pip install {what}"
    return ModuleNotFoundError(text, name=error.name)


def find(name: str):
    """The object `name` of transformers.

    Raises ImportError for a name that transformers 5 removed, with its replacement (in `from transformer_fast import
    name` the text of an AttributeError would be lost), and AttributeError for an unknown name, with similar names.
    Without transformers: ModuleNotFoundError for a class, for the same reason, AttributeError for other names.
    """
    try:
        import transformers
    except ImportError as error:
        if error.name != "transformers":
            raise
        if name[0].isupper() and isinstance(error, ModuleNotFoundError):
            raise import_error(name, error) from None
        raise AttributeError(
            f"module {__package__!r} has no attribute {name!r} (transformers might have: pip install '{TRANSFORMERS}')"
        ) from None
    known = set(dir(transformers))
    if name not in known and (today := _today(name, known)):
        raise ImportError(f"{name}: transformers {transformers.__version__} does not have it any more; use {today}")
    try:
        return getattr(transformers, name)
    except AttributeError:
        pass
    like = difflib.get_close_matches(name, known, n=3, cutoff=0.8)
    hint = f"; there are {', '.join(like)}" if like else ""
    raise AttributeError(
        f"neither {__package__} nor transformers {transformers.__version__} has an attribute {name!r}{hint}"
    )


def names() -> list[str]:
    """The public names of transformers if it is loaded, else none."""
    loaded = sys.modules.get("transformers")
    return [name for name in dir(loaded) if not name.startswith("_")] if loaded else []


def _today(name: str, known: set[str]) -> str:
    """What to use instead of a removed name; '' if that is not known."""
    for framework, prefix in (("TensorFlow", "TF"), ("Flax", "Flax")):
        bare = name.removeprefix(f"{prefix}_").removeprefix(prefix) if name.startswith(prefix) else ""
        if bare:
            today = bare if bare in known else _today(bare, known) or "the PyTorch class of the model"
            return f"{today} (there are no {framework} models in transformers 5)"
    if name in _GONE:
        return _GONE[name]
    for ending, new in _ENDINGS.items():
        today = f"{name.removesuffix(ending)}{new}"
        if name.endswith(ending) and today in known:
            return today
    return ""
