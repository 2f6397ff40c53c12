"""transformer_fast: fused attention, normalisation and activation kernels, and the models that run on them.

Names are loaded on first use, so importing this package loads neither transformers nor Triton. Other names of
transformers are passed through unchanged; `is_ours` tells which is which.
"""

import importlib as _importlib
import pathlib as _pathlib

from ._version import __version__
from .integrations import import_hook as _import_hook

# The Triton kernels are in <root>/kernels in a bare checkout, and in transformer_fast/kernels once installed.
if not (_pathlib.Path(__path__[0]) / "kernels").is_dir():
    __path__.append(str(_pathlib.Path(__path__[0]).parent))

_EXPORTS = {
    "backends": ["backend", "info"],
    "collation": ["sentence_pairs"],
    "features": ["layer_features"],
    "fine_tuning": [
        "GradualUnfreezing",
        "discriminative_learning_rates",
        "layer_groups",
        "slanted_triangular_schedule",
    ],
    "handed_on": ["is_ours"],
    "integrations": ["accelerate", "explain", "register", "restore"],
    "layers": [
        "AdditiveAttention",
        "DotProductAttention",
        "MultiHeadAttention",
        "MultiheadAttention",
        "compute_padding",
        "concat_pooling",
        "sinusoids",
    ],
    "models._quantizer": ["Int8Config"],
    "models.albert": [
        "AlbertForMaskedLM",
        "AlbertForMultipleChoice",
        "AlbertForPreTraining",
        "AlbertForQuestionAnswering",
        "AlbertForSequenceClassification",
        "AlbertForTokenClassification",
        "AlbertModel",
    ],
    "models.auto": [
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
    ],
    "models.awd_lstm": [
        "AWDLSTMConfig",
        "AWDLSTMForCausalLM",
        "AWDLSTMForSequenceClassification",
        "AWDLSTMModel",
    ],
    "models.bart": [
        "BartForCausalLM",
        "BartForConditionalGeneration",
        "BartForQuestionAnswering",
        "BartForSequenceClassification",
        "BartModel",
    ],
    "models.bert": [
        "BertForMaskedLM",
        "BertForMultipleChoice",
        "BertForNextSentencePrediction",
        "BertForPreTraining",
        "BertForQuestionAnswering",
        "BertForSequenceClassification",
        "BertForTokenClassification",
        "BertLMHeadModel",
        "BertModel",
    ],
    "models.camembert": [
        "CamembertForCausalLM",
        "CamembertForMaskedLM",
        "CamembertForMultipleChoice",
        "CamembertForQuestionAnswering",
        "CamembertForSequenceClassification",
        "CamembertForTokenClassification",
        "CamembertModel",
    ],
    "models.deberta_v2": [
        "DebertaV2ForMaskedLM",
        "DebertaV2ForMultipleChoice",
        "DebertaV2ForQuestionAnswering",
        "DebertaV2ForSequenceClassification",
        "DebertaV2ForTokenClassification",
        "DebertaV2Model",
    ],
    "models.distilbert": [
        "DistilBertForMaskedLM",
        "DistilBertForMultipleChoice",
        "DistilBertForQuestionAnswering",
        "DistilBertForSequenceClassification",
        "DistilBertForTokenClassification",
        "DistilBertModel",
    ],
    "models.elmo": [
        "ElmoConfig",
        "ElmoForPreTraining",
        "ElmoForSequenceClassification",
        "ElmoForTokenClassification",
        "ElmoModel",
        "ElmoTokenizer",
        "ScalarMix",
    ],
    "models.electra": [
        "ElectraForCausalLM",
        "ElectraForMaskedLM",
        "ElectraForMultipleChoice",
        "ElectraForPreTraining",
        "ElectraForQuestionAnswering",
        "ElectraForSequenceClassification",
        "ElectraForTokenClassification",
        "ElectraModel",
    ],
    "models.gpt2": [
        "GPT2DoubleHeadsModel",
        "GPT2ForQuestionAnswering",
        "GPT2ForSequenceClassification",
        "GPT2ForTokenClassification",
        "GPT2LMHeadModel",
        "GPT2Model",
    ],
    "models.gpt_neo": [
        "GPTNeoForCausalLM",
        "GPTNeoForQuestionAnswering",
        "GPTNeoForSequenceClassification",
        "GPTNeoForTokenClassification",
        "GPTNeoModel",
    ],
    "models.gpt_neox": [
        "GPTNeoXForCausalLM",
        "GPTNeoXForQuestionAnswering",
        "GPTNeoXForSequenceClassification",
        "GPTNeoXForTokenClassification",
        "GPTNeoXModel",
    ],
    "models.gemma2": [
        "Gemma2ForCausalLM",
        "Gemma2ForSequenceClassification",
        "Gemma2ForTokenClassification",
        "Gemma2Model",
    ],
    "models.modernbert": [
        "ModernBertForMaskedLM",
        "ModernBertForMultipleChoice",
        "ModernBertForQuestionAnswering",
        "ModernBertForSequenceClassification",
        "ModernBertForTokenClassification",
        "ModernBertModel",
    ],
    "models.mistral": [
        "MistralForCausalLM",
        "MistralForQuestionAnswering",
        "MistralForSequenceClassification",
        "MistralForTokenClassification",
        "MistralModel",
    ],
    "models.qwen2": [
        "Qwen2ForCausalLM",
        "Qwen2ForQuestionAnswering",
        "Qwen2ForSequenceClassification",
        "Qwen2ForTokenClassification",
        "Qwen2Model",
    ],
    "models.qwen3": [
        "Qwen3ForCausalLM",
        "Qwen3ForQuestionAnswering",
        "Qwen3ForSequenceClassification",
        "Qwen3ForTokenClassification",
        "Qwen3Model",
    ],
    "models.llama": [
        "LlamaForCausalLM",
        "LlamaForQuestionAnswering",
        "LlamaForSequenceClassification",
        "LlamaForTokenClassification",
        "LlamaModel",
    ],
    "models.m2m_100": ["M2M100ForConditionalGeneration", "M2M100Model"],
    "models.marian": ["MarianForCausalLM", "MarianMTModel", "MarianModel"],
    "models.mbart": [
        "MBartForCausalLM",
        "MBartForConditionalGeneration",
        "MBartForQuestionAnswering",
        "MBartForSequenceClassification",
        "MBartModel",
    ],
    "models.mpnet": [
        "MPNetForMaskedLM",
        "MPNetForMultipleChoice",
        "MPNetForQuestionAnswering",
        "MPNetForSequenceClassification",
        "MPNetForTokenClassification",
        "MPNetModel",
    ],
    "models.mt5": [
        "MT5EncoderModel",
        "MT5ForConditionalGeneration",
        "MT5ForQuestionAnswering",
        "MT5ForSequenceClassification",
        "MT5ForTokenClassification",
        "MT5Model",
    ],
    "models.openai_gpt": [
        "OpenAIGPTDoubleHeadsModel",
        "OpenAIGPTForSequenceClassification",
        "OpenAIGPTLMHeadModel",
        "OpenAIGPTModel",
    ],
    "models.opt": [
        "OPTForCausalLM",
        "OPTForQuestionAnswering",
        "OPTForSequenceClassification",
        "OPTModel",
    ],
    "models.pegasus": ["PegasusForCausalLM", "PegasusForConditionalGeneration", "PegasusModel"],
    "models.phi": [
        "PhiForCausalLM",
        "PhiForSequenceClassification",
        "PhiForTokenClassification",
        "PhiModel",
    ],
    "models.rnn": ["AttentionRNNConfig", "AttentionRNNForConditionalGeneration", "AttentionRNNModel"],
    "models.roberta": [
        "RobertaForCausalLM",
        "RobertaForMaskedLM",
        "RobertaForMultipleChoice",
        "RobertaForQuestionAnswering",
        "RobertaForSequenceClassification",
        "RobertaForTokenClassification",
        "RobertaModel",
    ],
    "models.t5": [
        "T5EncoderModel",
        "T5ForConditionalGeneration",
        "T5ForQuestionAnswering",
        "T5ForSequenceClassification",
        "T5ForTokenClassification",
        "T5Model",
    ],
    "models.transformer": [
        "TransformerConfig",
        "TransformerForConditionalGeneration",
        "TransformerModel",
        "noam_schedule",
    ],
    "models.xlm_roberta": [
        "XLMRobertaForCausalLM",
        "XLMRobertaForMaskedLM",
        "XLMRobertaForMultipleChoice",
        "XLMRobertaForQuestionAnswering",
        "XLMRobertaForSequenceClassification",
        "XLMRobertaForTokenClassification",
        "XLMRobertaModel",
    ],
    "models.umt5": [
        "UMT5EncoderModel",
        "UMT5ForConditionalGeneration",
        "UMT5ForQuestionAnswering",
        "UMT5ForSequenceClassification",
        "UMT5ForTokenClassification",
        "UMT5Model",
    ],
    "ops": [
        "RelativeBias",
        "add_layer_norm",
        "add_rms_norm",
        "additive_attention",
        "attention_probabilities",
        "bias_activation",
        "cross_entropy",
        "dropout",
        "embedding_layer_norm",
        "kv_cache_attention",
        "gru",
        "layer_norm",
        "linear",
        "linear_cross_entropy",
        "lstm",
        "multi_head_attention",
        "to_panels",
        "projections",
        "rms_norm",
        "rotary_cache_append",
        "rotary_embedding",
        "scaled_dot_product_attention",
        "varlen_attention",
    ],
    "pipelines": [
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
    ],
    "quantization": ["dequantize", "quantize", "quantized_modules"],
}
_MODULES = [
    "backends",
    "benchmarks",
    "cli",
    "collation",
    "commands",
    "demo",
    "distributed",
    "features",
    "fine_tuning",
    "generation",
    "handed_on",
    "integrations",
    "kernels",
    "layers",
    "models",
    "ops",
    "pipelines",
    "quantization",
    "verify",
]
_WHERE = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = ["__version__", *sorted(_WHERE)]


def __getattr__(name: str):
    module = _WHERE.get(name)
    if module is not None:
        try:
            value = getattr(_importlib.import_module(f".{module}", __name__), name)
        except ImportError as error:
            raise _importlib.import_module(".handed_on", __name__).import_error(name, error) from error
    elif name in _MODULES:
        return _importlib.import_module(f".{name}", __name__)
    elif name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    else:
        value = _importlib.import_module(".handed_on", __name__).find(name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE, *_importlib.import_module(".handed_on", __name__).names()})


_import_hook.install()
