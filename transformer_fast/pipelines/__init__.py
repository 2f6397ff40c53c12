"""Tasks on text: `pipeline(task, model=...)`. The pipelines are transformers' own, plus the four that transformers 5
dropped (question-answering, summarization, translation, text2text-generation)."""

from .factory import pipeline, supported_tasks
from .question_answering import QuestionAnsweringPipeline
from .text2text import SummarizationPipeline, Text2TextGenerationPipeline, TranslationPipeline
from .transformers_own import (
    FeatureExtractionPipeline,
    FillMaskPipeline,
    TextClassificationPipeline,
    TextGenerationPipeline,
    TokenClassificationPipeline,
    ZeroShotClassificationPipeline,
)

__all__ = [
    "FeatureExtractionPipeline",
    "FillMaskPipeline",
    "QuestionAnsweringPipeline",
    "SummarizationPipeline",
    "Text2TextGenerationPipeline",
    "TextClassificationPipeline",
    "TextGenerationPipeline",
    "TokenClassificationPipeline",
    "TranslationPipeline",
    "ZeroShotClassificationPipeline",
    "pipeline",
    "supported_tasks",
]
