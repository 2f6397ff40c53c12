"""The families: model_type -> the module of this package that has its classes, under HF's names where HF has it."""

FAMILIES = {
    "albert": "albert",
    "attention_rnn": "rnn",
    "awd_lstm": "awd_lstm",
    "bart": "bart",
    "bert": "bert",
    "camembert": "camembert",
    "deberta-v2": "deberta_v2",
    "distilbert": "distilbert",
    "electra": "electra",
    "elmo": "elmo",
    "gemma2": "gemma2",
    "mbart": "mbart",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gpt2": "gpt2",
    "llama": "llama",
    "marian": "marian",
    "modernbert": "modernbert",
    "mpnet": "mpnet",
    "openai-gpt": "openai_gpt",
    "roberta": "roberta",
    "t5": "t5",
    "transformer_2017": "transformer",
    "xlm-roberta": "xlm_roberta",
}

# Those that HF has no class for: what the names of their classes begin with.
OWN = {
    "attention_rnn": "AttentionRNN",
    "awd_lstm": "AWDLSTM",
    "elmo": "Elmo",
    "transformer_2017": "Transformer",
}
