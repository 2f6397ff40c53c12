"""State that generation keeps on a model between calls."""

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch

from ..backends.memory import Kept
from ..ops.decoder_step import DecoderCopies
from ..ops.head_screen import HeadScreen

__all__ = ["DecoderState", "decoder_state"]

_NAME = "_decoder_state"


@dataclass
class DecoderState:
    """Kept on the model and freed with it. Copies and pickles of a model start with an empty one.

    storage: (dtype, whether to copy) from set_weight_storage, or None. copies, screen: the weight copies and the head
    screen of the last generation. made: the caches that transformers created for calls of generate, as opposed to
    caches that a user passed. memory: for the caches of native steps, kept between generations.
    """

    storage: tuple[torch.dtype | None, bool] | None = None
    copies: DecoderCopies | None = None
    screen: HeadScreen | None = None
    made: weakref.WeakSet = field(default_factory=weakref.WeakSet)
    memory: Kept = field(default_factory=Kept)

    def __deepcopy__(self, memo) -> "DecoderState":
        return DecoderState()

    def __reduce__(self):
        return DecoderState, ()


def decoder_state(model: Any) -> DecoderState:
    """The model's DecoderState; created empty if there is none."""
    return model.__dict__.setdefault(_NAME, DecoderState())
