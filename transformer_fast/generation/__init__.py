"""Generation: one decoding engine for all models, behind Hugging Face's generate()."""

from .mixin import GenerationMixin
from .step_description import StepDescription
from .stepper import Prompt, Stepper, choose_stepper
from .weights import set_weight_storage

__all__ = ["GenerationMixin", "Prompt", "StepDescription", "Stepper", "choose_stepper", "set_weight_storage"]
