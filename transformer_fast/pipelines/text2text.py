"""Text to text by an encoder-decoder: text2text-generation, summarization, translation."""

from typing import Any

import torch
from transformers.pipelines.base import Pipeline
from transformers.tokenization_utils_base import TruncationStrategy
from transformers.utils import logging

from ._lists import ListInputs

__all__ = ["SummarizationPipeline", "Text2TextGenerationPipeline", "TranslationPipeline"]

logger = logging.get_logger(__name__)
_DEFAULTS = {"max_new_tokens": 256, "num_beams": 4}


class Text2TextGenerationPipeline(ListInputs, Pipeline):
    """Text to text by an encoder-decoder: text -> [{"generated_text": text}].

    Call with a text, or a list, generator or dataset of texts. All arguments that are not listed go to model.generate.
    The defaults are 256 new tokens and 4 beams, unless the model's generation configuration or
    config.task_specific_params (T5's prefixes) has others for the task.

    Args:
        return_tensors: give {"generated_token_ids": tensor} in place of the text; with return_text=True both.
        return_text: give the text.
        clean_up_tokenization_spaces: as in the tokenizer's decode.
        truncation: as in the tokenizer.
        stop_sequence: text whose first token ends generation.
        prefix: text before each input.

    Returns:
        One dict per returned sequence; for a list of texts a list of dicts (of lists of dicts if num_return_sequences
        is above 1).

    Raises:
        ValueError: for a model that is no encoder-decoder or does not generate.
    """

    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True
    return_name = "generated"
    list_batch_size = 8

    def __init__(self, *args, task: str = "text2text-generation", **kwargs):
        super().__init__(*args, task=task, **kwargs)
        if not self.model.can_generate() or not self.model.config.is_encoder_decoder:
            raise ValueError(
                f"model: {self.task} wants an encoder-decoder that generates, got {type(self.model).__name__}"
            )

    def __call__(self, inputs, *args, **kwargs):
        """See the class."""
        if isinstance(inputs, tuple):
            inputs = list(inputs)
        outputs = super().__call__(inputs, *args, **kwargs)
        if isinstance(inputs, list) and all(len(found) == 1 for found in outputs):
            return [found[0] for found in outputs]
        return outputs

    def _sanitize_parameters(
        self,
        return_tensors: bool | None = None,
        return_text: bool | None = None,
        clean_up_tokenization_spaces: bool | None = None,
        truncation: Any = None,
        stop_sequence: str | None = None,
        prefix: str | None = None,
        **generate_kwargs,
    ):
        before = {"truncation": truncation, "prefix": prefix}
        after = {
            "return_tensors": return_tensors,
            "return_text": return_text,
            "clean_up_tokenization_spaces": clean_up_tokenization_spaces,
        }
        if stop_sequence is not None:
            ids = self.tokenizer.encode(stop_sequence, add_special_tokens=False)
            if len(ids) != 1:
                logger.warning(f"stop_sequence: {stop_sequence!r} is {len(ids)} tokens; generation stops at the first.")
            generate_kwargs["eos_token_id"] = ids[0]
        before, after = ({k: v for k, v in d.items() if v is not None} for d in (before, after))
        return before, generate_kwargs, after

    def _task_params(self) -> dict:
        """The checkpoint's generation arguments and prefix for this task."""
        return dict((getattr(self.model.config, "task_specific_params", None) or {}).get(self.task, {}))

    def _prefixed(self, text: Any, prefix: str | None) -> str:
        if not isinstance(text, str):
            raise ValueError(
                f"inputs: wanted text, or a list, generator or dataset of texts, got {type(text).__name__}"
            )
        if prefix is None:
            prefix = self._task_params().get("prefix", getattr(self.model.config, "prefix", None))
        return (prefix or "") + text

    def preprocess(self, text, truncation=TruncationStrategy.DO_NOT_TRUNCATE, prefix=None, **kwargs):
        encoded = self.tokenizer(self._prefixed(text, prefix), truncation=truncation, return_tensors="pt", **kwargs)
        encoded.pop("token_type_ids", None)  # encoder-decoders have none
        return encoded

    def _generate_arguments(self, kwargs: dict) -> dict:
        if kwargs.get("generation_config") is not None:
            return kwargs
        task = {k: v for k, v in self._task_params().items() if k != "prefix"}
        said = self.model.generation_config.to_diff_dict() | task | kwargs
        filled = {name: value for name, value in _DEFAULTS.items() if said.get(name) is None}
        if said.get("max_length") is not None:
            filled.pop("max_new_tokens", None)
        if "max_new_tokens" in kwargs:
            task.pop("max_length", None)
        return filled | task | kwargs

    def check_inputs(self, input_length: int, arguments: dict) -> None:
        """Warn about lengths that contradict each other."""

    def _forward(self, inputs, **kwargs):
        ids = inputs["input_ids"]
        if not ids.shape[1]:
            raise ValueError("inputs: wanted at least one token, got an empty text")
        arguments = self._generate_arguments(kwargs)
        self.check_inputs(ids.shape[1], arguments)
        found = self.model.generate(**inputs, **arguments)
        sequences = found if isinstance(found, torch.Tensor) else found.sequences
        return {"output_ids": sequences.unflatten(0, (ids.shape[0], -1))}

    def postprocess(self, outputs, return_tensors=False, return_text=None, clean_up_tokenization_spaces=None):
        records = []
        for ids in outputs["output_ids"][0]:
            record = {f"{self.return_name}_token_ids": ids} if return_tensors else {}
            if return_text or (return_text is None and not return_tensors):
                record[f"{self.return_name}_text"] = self.tokenizer.decode(
                    ids, skip_special_tokens=True, clean_up_tokenization_spaces=clean_up_tokenization_spaces
                )
            records.append(record)
        self._advance()
        return records


class SummarizationPipeline(Text2TextGenerationPipeline):
    """Summaries: text -> [{"summary_text": text}]. Arguments are those of Text2TextGenerationPipeline."""

    return_name = "summary"

    def __init__(self, *args, task: str = "summarization", **kwargs):
        super().__init__(*args, task=task, **kwargs)

    def check_inputs(self, input_length: int, arguments: dict) -> None:
        shortest, longest = arguments.get("min_length"), arguments.get("max_length")
        if shortest is not None and longest is not None and longest < shortest:
            logger.warning(f"min_length={shortest} is more than max_length={longest}.")
        if longest is not None and input_length < longest:
            logger.warning(
                f"max_length is {longest}, but a text has only {input_length} tokens: a summary is shorter than its "
                f"text, perhaps max_length={input_length // 2}."
            )


class TranslationPipeline(Text2TextGenerationPipeline):
    """Translations: text -> [{"translation_text": text}]. Other arguments are those of Text2TextGenerationPipeline.

    Args:
        src_lang: language of the text, for tokenizers that need it (mBART, NLLB, M2M100). The task translation_xx_to_yy
            sets both, and selects T5's prefix.
        tgt_lang: language of the translation.
    """

    return_name = "translation"

    def __init__(self, *args, task: str = "translation", **kwargs):
        super().__init__(*args, task=task, **kwargs)

    def _sanitize_parameters(self, src_lang: str | None = None, tgt_lang: str | None = None, **kwargs):
        before, generate, after = super()._sanitize_parameters(**kwargs)
        if src_lang is None and tgt_lang is None:
            parts = self.task.split("_")
            if len(parts) == 4:
                src_lang, tgt_lang = parts[1], parts[3]
        languages = {"src_lang": src_lang, "tgt_lang": tgt_lang}
        return before | {k: v for k, v in languages.items() if v is not None}, generate, after

    def preprocess(
        self, text, truncation=TruncationStrategy.DO_NOT_TRUNCATE, prefix=None, src_lang=None, tgt_lang=None
    ):
        build = getattr(self.tokenizer, "_build_translation_inputs", None)
        if build is None:
            return super().preprocess(text, truncation, prefix)
        for name, value in (("src_lang", src_lang), ("tgt_lang", tgt_lang)):
            if value is None and getattr(self.tokenizer, name, None) is None:
                raise ValueError(
                    f"{name}: {type(self.tokenizer).__name__} wants a language; pass {name}=... or a task "
                    "translation_xx_to_yy"
                )
        return build(
            self._prefixed(text, prefix),
            return_tensors="pt",
            truncation=truncation,
            src_lang=src_lang or self.tokenizer.src_lang,
            tgt_lang=tgt_lang or self.tokenizer.tgt_lang,
        )
