"""XLM-RoBERTa (Conneau et al., 2020), every head: see _roberta."""

from transformers.models.xlm_roberta import modeling_xlm_roberta as hf

from ._roberta import classes_of

globals().update(classes_of(hf, "XLMRoberta", __name__))
