"""The families: HF's model_type -> the module of this package that has its classes, under HF's own names."""

FAMILIES = {
    "bart": "bart",
    "bert": "bert",
    "marian": "marian",
    "t5": "t5",
}
