"""RoBERTa (Liu et al., 2019), every head: see _roberta."""

from transformers.models.roberta import modeling_roberta as hf

from ._roberta import classes_of

globals().update(classes_of(hf, "Roberta", __name__))
