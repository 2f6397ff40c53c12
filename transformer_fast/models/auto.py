"""AutoModel*: this package's class for a checkpoint's model_type, chosen by HF's own mapping of model types to classes;
transformers' class where this package has none."""

import importlib
import warnings
from collections import OrderedDict

import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ._loading import drop_trust, explain_broken, local_folder, model_type_of
from .registry import FAMILIES, OWN

__all__ = [
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForMultipleChoice",
    "AutoModelForNextSentencePrediction",
    "AutoModelForPreTraining",
    "AutoModelForQuestionAnswering",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
]


def _own(suffix: str) -> OrderedDict:
    return OrderedDict((model_type, stem + suffix) for model_type, stem in OWN.items())


def _class_for(names: dict, model_type: str):
    """Our class of this name, or None."""
    name = names.get(model_type)
    if model_type not in FAMILIES or not isinstance(name, str):
        return None
    return getattr(importlib.import_module(f".{FAMILIES[model_type]}", __package__), name, None)


class _Mapping(OrderedDict):
    """{config class: our model class}, in the form that HF's auto classes read; filled on first use."""

    def __init__(self, names: dict):
        super().__init__()
        self.names = names

    def __missing__(self, config_class):
        model = _class_for(self.names, getattr(config_class, "model_type", ""))
        if model is None:
            raise KeyError(config_class)
        self[config_class] = model
        return model

    def __contains__(self, config_class):
        if super().__contains__(config_class):
            return True
        return _class_for(self.names, getattr(config_class, "model_type", "")) is not None

    def register(self, key, value, exist_ok=False):
        if key in self and not exist_ok:
            raise ValueError(f"{key.__name__}: is registered already; pass exist_ok=True to replace it")
        self[key] = value


def _theirs(cls, model_type: str | None, kwargs: dict):
    """transformers' auto class, if transformers has a class for model_type and this package has none; else None."""
    names, registered = cls._model_mapping.names, list(cls._model_mapping)
    known = sorted(t for t in FAMILIES if _class_for(names, t) is not None)
    if model_type is None or model_type in known or any(model_type == c.model_type for c in registered):
        return None
    theirs = next(base for base in cls.__mro__ if base.__module__.startswith("transformers."))
    if model_type not in CONFIG_MAPPING or CONFIG_MAPPING[model_type] not in theirs._model_mapping:
        raise ValueError(
            f"{cls.__name__}: neither this package nor transformers has a class for model_type {model_type!r}; this "
            f"package has {', '.join(known)}"
        )
    warnings.warn(
        f"{cls.__name__}: this package has no class for model_type {model_type!r}; transformers' own is used, "
        f"{'unchanged, as attn_implementation is given' if 'attn_implementation' in kwargs else 'with accelerate()'}",
        stacklevel=3,
    )
    return theirs


def _accelerated(loaded, kwargs: dict):
    """transformers' model, or (model, loading info), after accelerate()."""
    if "attn_implementation" not in kwargs:
        # Imported by name: accelerate is a layer above the models, and only other models need it here.
        acceleration = importlib.import_module("..integrations.acceleration", __package__)
        acceleration.accelerate(loaded[0] if isinstance(loaded, tuple) else loaded, verbose=False)
    return loaded


class _Auto:
    """Mixin, placed before HF's auto class: our table is tried first."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """As HF's. For a model_type without a class in this package, loads transformers' own model, with a warning and,
        unless attn_implementation is given, with accelerate(). Raises ValueError where transformers has no class
        either, OSError where the hub is needed and cannot be reached."""
        drop_trust(kwargs)
        config = kwargs.get("config")
        if isinstance(config, transformers.PreTrainedConfig):
            model_type = config.model_type
        else:
            model_type = model_type_of(config or pretrained_model_name_or_path, kwargs)
        if theirs := _theirs(cls, model_type, kwargs):
            try:
                loaded = theirs.from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
            except Exception as error:
                explain_broken(
                    error, pretrained_model_name_or_path, local_folder(pretrained_model_name_or_path, kwargs)
                )
                raise
            return _accelerated(loaded, kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)

    @classmethod
    def from_config(cls, config, **kwargs):
        """As HF's. For a model_type without a class in this package, transformers' own model, as in from_pretrained."""
        drop_trust(kwargs)
        if theirs := _theirs(cls, config.model_type, kwargs):
            return _accelerated(theirs.from_config(config, **kwargs), kwargs)
        return super().from_config(config, **kwargs)


class AutoModel(_Auto, transformers.AutoModel):
    _model_mapping = _Mapping(modeling_auto.MODEL_MAPPING_NAMES | _own("Model"))  # type: ignore[assignment]


class AutoModelForPreTraining(_Auto, transformers.AutoModelForPreTraining):
    _model_mapping = _Mapping(  # type: ignore[assignment]
        modeling_auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES | _own("ForPreTraining")
    )


class AutoModelForMaskedLM(_Auto, transformers.AutoModelForMaskedLM):
    _model_mapping = _Mapping(modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES)  # type: ignore[assignment]


class AutoModelForCausalLM(_Auto, transformers.AutoModelForCausalLM):
    _model_mapping = _Mapping(  # type: ignore[assignment]
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES | _own("ForCausalLM")
    )


class AutoModelForNextSentencePrediction(_Auto, transformers.AutoModelForNextSentencePrediction):
    _model_mapping = _Mapping(modeling_auto.MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING_NAMES)  # type: ignore[assignment]


class AutoModelForSequenceClassification(_Auto, transformers.AutoModelForSequenceClassification):
    _model_mapping = _Mapping(  # type: ignore[assignment]
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES | _own("ForSequenceClassification")
    )


class AutoModelForTokenClassification(_Auto, transformers.AutoModelForTokenClassification):
    _model_mapping = _Mapping(  # type: ignore[assignment]
        modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES | _own("ForTokenClassification")
    )


class AutoModelForQuestionAnswering(_Auto, transformers.AutoModelForQuestionAnswering):
    _model_mapping = _Mapping(modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES)  # type: ignore[assignment]


class AutoModelForMultipleChoice(_Auto, transformers.AutoModelForMultipleChoice):
    _model_mapping = _Mapping(modeling_auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES)  # type: ignore[assignment]


class AutoModelForSeq2SeqLM(_Auto, transformers.AutoModelForSeq2SeqLM):
    _model_mapping = _Mapping(  # type: ignore[assignment]
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES | _own("ForConditionalGeneration")
    )
