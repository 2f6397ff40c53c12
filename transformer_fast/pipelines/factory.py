"""pipeline(task, model=...): the pipeline, model and tokenizer of a task."""

import importlib.util
import os
import re
import warnings
from typing import Any, NamedTuple

import transformers as hf
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.base import Pipeline

from .._transformers import name_or_path
from ..integrations import accelerate
from ..models import auto
from ..models._elmo_tokenizer import ElmoTokenizer
from ..models._loading import drop_trust, explain_broken, local_folder, need_hub
from . import transformers_own as own
from .question_answering import QuestionAnsweringPipeline
from .text2text import SummarizationPipeline, Text2TextGenerationPipeline, TranslationPipeline

__all__ = ["pipeline", "supported_tasks"]


class _Task(NamedTuple):
    pipeline: type[Pipeline]
    auto_model: str  # the name of the auto class, transformers' and ours
    default: str | None = None  # None: transformers' own default


TASKS = {
    "feature-extraction": _Task(own.FeatureExtractionPipeline, "AutoModel"),
    "fill-mask": _Task(own.FillMaskPipeline, "AutoModelForMaskedLM"),
    "question-answering": _Task(
        QuestionAnsweringPipeline,
        "AutoModelForQuestionAnswering",
        "distilbert/distilbert-base-cased-distilled-squad",
    ),
    "summarization": _Task(SummarizationPipeline, "AutoModelForSeq2SeqLM", "sshleifer/distilbart-cnn-12-6"),
    "text-classification": _Task(own.TextClassificationPipeline, "AutoModelForSequenceClassification"),
    "text-generation": _Task(own.TextGenerationPipeline, "AutoModelForCausalLM"),
    "text2text-generation": _Task(Text2TextGenerationPipeline, "AutoModelForSeq2SeqLM", "google-t5/t5-base"),
    "token-classification": _Task(own.TokenClassificationPipeline, "AutoModelForTokenClassification"),
    "translation": _Task(TranslationPipeline, "AutoModelForSeq2SeqLM", "google-t5/t5-base"),
    "zero-shot-classification": _Task(own.ZeroShotClassificationPipeline, "AutoModelForSequenceClassification"),
}
_ALIASES = {"sentiment-analysis": "text-classification", "ner": "token-classification"}
_TRANSLATION = re.compile(r"translation_\w+_to_\w+")


def supported_tasks() -> list[str]:
    """The tasks that `pipeline` knows, aliases included."""
    return sorted([*TASKS, *_ALIASES, "translation_xx_to_yy"])


def _find(task: Any) -> _Task:
    if isinstance(task, str):
        name = "translation" if _TRANSLATION.fullmatch(task) else _ALIASES.get(task, task)
        if name in TASKS:
            return TASKS[name]
    elsewhere = " (transformers.pipeline has it)" if task in PIPELINE_REGISTRY.get_supported_tasks() else ""
    raise ValueError(f"task: {task!r} is unknown{elsewhere}; there are {', '.join(supported_tasks())}")


def pipeline(
    task: str,
    model: Any = None,
    config: Any = None,
    tokenizer: Any = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    device: Any = None,
    device_map: Any = None,
    dtype: Any = "auto",
    torch_dtype: Any = None,
    trust_remote_code: bool | None = None,
    use_fast: bool = True,
    model_kwargs: dict | None = None,
    pipeline_class: type[Pipeline] | None = None,
    progress: bool = False,
    **kwargs,
) -> Pipeline:
    """A callable text -> answers, like transformers.pipeline, with this package's models.

    Lists are computed in batches of similar lengths; outputs are in the order of the list.

    Args:
        task: sentiment-analysis / text-classification, ner / token-classification, question-answering, fill-mask,
            text-generation, summarization, translation (translation_xx_to_yy), text2text-generation,
            feature-extraction, zero-shot-classification. Where transformers 5 has the pipeline it is used; the others
            are this package's.
        model: a checkpoint's folder or name, or a model; default: transformers' default for the task. A checkpoint
            of a family without a class in this package is loaded by transformers and given to `accelerate`, with a
            warning.
        config: as in transformers.pipeline.
        tokenizer: its folder or name, or a tokenizer; default: the model's.
        revision: as in transformers.pipeline, like token, device, device_map, dtype, model_kwargs and the task's
            arguments.
        token: for the hub.
        device: of the model.
        device_map: devices of the model's parts.
        dtype: of the model.
        torch_dtype: the older name of dtype.
        trust_remote_code: has no effect: code in a checkpoint is never run.
        use_fast: load a fast tokenizer.
        model_kwargs: for from_pretrained.
        pipeline_class: replaces the task's pipeline class.
        progress: show a bar over lists, generators and datasets; also an argument of each call.

    Returns:
        A transformers.Pipeline.

    Raises:
        ValueError: for an unknown task, or a model that is of no use for the task.
        TypeError: for a model or tokenizer of another type.
        ImportError: when a tokenizer needs a package that is not installed.
        OSError: for a checkpoint that is neither on this machine nor available from the hub.

    Examples:
        >>> import transformer_fast
        >>> from transformer_fast.demo import locate
        >>> read = transformer_fast.pipeline("feature-extraction", model=locate())
        >>> len(read("One text.")[0][0])
        384
    """
    found = _find(task)
    loading = {"revision": revision, "token": token}
    if "local_files_only" in kwargs:
        loading["local_files_only"] = kwargs.pop("local_files_only")
    loading = {name: value for name, value in loading.items() if value is not None}
    if trust_remote_code:
        drop_trust({"trust_remote_code": True})
    if model is None:
        if tokenizer is not None:
            raise ValueError("model: wanted one, as the given tokenizer may not fit the task's default model")
        model = found.default or PIPELINE_REGISTRY.check_task(_ALIASES.get(task, task))[1]["default"]["model"][0]
        try:
            need_hub(model, loading)
        except OSError as error:
            raise OSError(f"model: none was given for {task!r}, and the default cannot be loaded: {error}") from None
        warnings.warn(f"model: none given, {model} is used", stacklevel=2)
    source = model
    if isinstance(model, (str, os.PathLike)):
        loads = {**loading, "dtype": torch_dtype or dtype, "device_map": device_map, **(model_kwargs or {})}
        model = _load_model(found.auto_model, os.fspath(model), config, loads, task)
    elif not isinstance(model, hf.PreTrainedModel):
        raise TypeError(f"model: wanted a checkpoint's name or a PreTrainedModel, got {type(model).__name__}")
    if tokenizer is None:
        tokenizer = source if isinstance(source, (str, os.PathLike)) else name_or_path(model.config)
        if not tokenizer:
            raise ValueError("tokenizer: wanted one, as the model was not loaded from a checkpoint with a tokenizer")
    if isinstance(tokenizer, (str, os.PathLike)):
        tokenizer = _load_tokenizer(os.fspath(tokenizer), use_fast=use_fast, **loading)
    elif not isinstance(tokenizer, (hf.PreTrainedTokenizerBase, ElmoTokenizer)):
        raise TypeError(f"tokenizer: wanted its name or a tokenizer, got {type(tokenizer).__name__}")
    if device is not None:
        kwargs["device"] = device
    name = task if _TRANSLATION.fullmatch(task) else _ALIASES.get(task, task)
    if pipeline_class is not None:
        return pipeline_class(model=model, tokenizer=tokenizer, task=name, **kwargs)
    return found.pipeline(model=model, tokenizer=tokenizer, task=name, progress=progress, **kwargs)


def _load_model(auto_model: str, name: str, config: Any, loads: dict, task: str) -> hf.PreTrainedModel:
    """Our class for the checkpoint's model_type, else transformers' own with accelerate()."""
    loads = {key: value for key, value in loads.items() if value is not None}
    if local_folder(name, loads) is None:  # raises for a path that does not exist
        need_hub(name, loads)
    if not isinstance(config, hf.PreTrainedConfig):
        hub = {key: value for key, value in loads.items() if key not in ("dtype", "device_map")}
        config = hf.AutoConfig.from_pretrained(config or name, **hub)
    ours = getattr(auto, auto_model, None)
    if ours is not None and type(config) in ours._model_mapping:
        return ours.from_pretrained(name, config=config, **loads)
    theirs = getattr(hf, auto_model)
    if type(config) not in theirs._model_mapping:
        raise ValueError(
            f"model: {name} has model_type {config.model_type!r}, which has no model for the task {task!r} "
            f"({auto_model}), neither in this package nor in transformers"
        )
    try:
        model = theirs.from_pretrained(name, config=config, trust_remote_code=False, **loads)
    except Exception as error:
        explain_broken(error, name, local_folder(name, loads))
        raise
    report = accelerate(model, verbose=False)
    warnings.warn(
        f"{name}: this package has no class for model_type {config.model_type!r} in this task; transformers' "
        f"{type(model).__name__} is used with {len(report.swapped)} parts of it accelerated",
        stacklevel=3,
    )
    return model


def _load_tokenizer(name: str, **loading) -> hf.PreTrainedTokenizerBase:
    try:
        return hf.AutoTokenizer.from_pretrained(name, **loading)
    except Exception as error:
        text = str(error).lower()
        # Without sentencepiece or protobuf, transformers takes the file for tiktoken's, and its error asks for
        # tiktoken.
        asked = {
            "sentencepiece": (("sentencepiece", "tiktoken", "protobuf"), "sentencepiece"),
            "protobuf": (("sentencepiece", "tiktoken", "protobuf"), "google.protobuf"),
            "sacremoses": (("sacremoses",), "sacremoses"),
        }
        missing = [
            package
            for package, (words, module) in asked.items()
            if any(word in text for word in words) and not _installed(module)
        ]
        if missing:
            raise ImportError(
                f"{name}: its tokenizer needs {' and '.join(missing)}, not installed here: pip install "
                f"{' '.join(missing)}"
            ) from error
        raise


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


def _register() -> None:
    """Register the tasks that transformers dropped in its registry."""
    for task in ("question-answering", "summarization", "text2text-generation", "translation"):
        entry = TASKS[task]
        classes = [getattr(auto, entry.auto_model, None), getattr(hf, entry.auto_model)]
        PIPELINE_REGISTRY.register_pipeline(
            task,
            pipeline_class=entry.pipeline,
            pt_model=tuple(c for c in classes if c is not None),
            default={"model": (entry.default, "main")},
            type="text",
        )


_register()
