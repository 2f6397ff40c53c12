"""The families: model_type -> the module of this package that has its classes, under HF's names where HF has it."""

FAMILIES = {
    "albert": "albert",
    "attention_rnn": "rnn",
    "bert": "bert",
    "distilbert": "distilbert",
    "gpt2": "gpt2",
    "openai-gpt": "openai_gpt",
    "transformer_2017": "transformer",
}

# Those that HF has no class for: what the names of their classes begin with.
OWN = {
    "attention_rnn": "AttentionRNN",
    "transformer_2017": "Transformer",
}
