"""What generation keeps of a model from one call to the next."""

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
    """Kept on the model and freed with it. Copies and pickles of a model have an empty one.

    storage: (dtype, whether to copy) of set_weight_storage, or None. copies: of the weights, which the last generation
    has left; screen: of the head's weight, likewise. made: the caches that transformers has made for calls of generate,
    which nobody else reads. memory: that caches on the CPU lay in.
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
    """The model's own; an empty one where there was none."""
    return model.__dict__.setdefault(_NAME, DecoderState())
