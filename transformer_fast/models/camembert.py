"""CamemBERT (Martin et al., 2020), every head: see _roberta."""

from transformers.models.camembert import modeling_camembert as hf

from ._roberta import classes_of

globals().update(classes_of(hf, "Camembert", __name__))
