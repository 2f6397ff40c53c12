"""The families: HF's model_type -> the module of this package that has its classes, under HF's own names."""

FAMILIES = {
    "bert": "bert",
    "gpt2": "gpt2",
    "openai-gpt": "openai_gpt",
}
