"""The families: HF's model_type -> the module of this package that has its classes, under HF's own names."""

FAMILIES = {
    "albert": "albert",
    "bart": "bart",
    "bert": "bert",
    "distilbert": "distilbert",
    "marian": "marian",
    "t5": "t5",
}
