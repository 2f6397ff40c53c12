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
    "m2m_100": "m2m_100",
    "marian": "marian",
    "modernbert": "modernbert",
    "mpnet": "mpnet",
    "mt5": "mt5",
    "openai-gpt": "openai_gpt",
    "pegasus": "pegasus",
    "roberta": "roberta",
    "t5": "t5",
    "transformer_2017": "transformer",
    "umt5": "umt5",
    "xlm-roberta": "xlm_roberta",
}

# Those that HF has no class for: what the names of their classes begin with.
OWN = {
    "attention_rnn": "AttentionRNN",
    "awd_lstm": "AWDLSTM",
    "elmo": "Elmo",
    "transformer_2017": "Transformer",
}
