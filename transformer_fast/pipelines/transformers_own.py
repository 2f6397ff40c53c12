"""transformers' own pipelines, with lists in batches of similar lengths and progress bars."""

import transformers as hf

from ._lists import ListInputs

__all__ = [
    "FeatureExtractionPipeline",
    "FillMaskPipeline",
    "TextClassificationPipeline",
    "TextGenerationPipeline",
    "TokenClassificationPipeline",
    "ZeroShotClassificationPipeline",
]


class TextClassificationPipeline(ListInputs, hf.TextClassificationPipeline):
    __doc__ = hf.TextClassificationPipeline.__doc__
    list_batch_size = 32


class TokenClassificationPipeline(ListInputs, hf.TokenClassificationPipeline):
    __doc__ = hf.TokenClassificationPipeline.__doc__
    list_batch_size = 32

    def _order(self, inputs: list, kwargs: dict) -> list[int] | None:
        split = kwargs.get("is_split_into_words") or self._preprocess_params.get("is_split_into_words")
        return None if split or kwargs.get("offset_mapping") else super()._order(inputs, kwargs)


class FillMaskPipeline(ListInputs, hf.FillMaskPipeline):
    __doc__ = hf.FillMaskPipeline.__doc__
    list_batch_size = 8  # small, because logits are (B, S, V)


class TextGenerationPipeline(ListInputs, hf.TextGenerationPipeline):
    __doc__ = hf.TextGenerationPipeline.__doc__


class FeatureExtractionPipeline(ListInputs, hf.FeatureExtractionPipeline):
    __doc__ = hf.FeatureExtractionPipeline.__doc__


class ZeroShotClassificationPipeline(ListInputs, hf.ZeroShotClassificationPipeline):
    __doc__ = hf.ZeroShotClassificationPipeline.__doc__
