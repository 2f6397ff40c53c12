"""Generation: one engine for every decoder, under Hugging Face's generate."""

from .mixin import GenerationMixin
from .stepper import Prompt, Stepper, choose_stepper

__all__ = ["GenerationMixin", "Prompt", "Stepper", "choose_stepper"]
