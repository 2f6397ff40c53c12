"""How decoding on the CPU stores a model's weights: in place, or in copies that are kept between generations."""

import torch
from torch import nn

from ..backends.contents import mirror_files
from ..ops.decoder_step import DecoderCopies
from ..ops.decoder_tensors import Projection, StepTensors
from ..ops.head_screen import HeadScreen
from ..ops.linear_panel import STORAGES
from .decoder_state import decoder_state

__all__ = ["decoder_copies", "head_screen", "kept_copies", "set_weight_storage"]

_WORTH = 1 << 22  # a head needs at least this many bytes for a screen to pay off


def set_weight_storage(model: nn.Module, dtype: torch.dtype | None = None, *, copy: bool | None = None) -> None:
    """Choose how decoding on the CPU stores the model's weights.

    Each generation checks whether the copy still matches the weights, whatever may have written to them (any optimizer,
    `.data`, numpy, a load, merged adapters, another process), and makes a new copy if not. Weights in unwritten pages
    of a mapped checkpoint file are checked by their pages; all others are hashed at the rate at which memory is read.
    For the 494 MB of gpt2 this takes 2.5 ms and 50 ms on a busy AMD EPYC (Zen 5).

    Args:
        model: a model of this package.
        dtype: dtype of the copy. torch.bfloat16 halves the bytes that a step of a float32 model reads and rounds the
            weights to 8 significant bits. torch.int8 reads a quarter: round(w / s) with a scale s = max |w| / 127 per
            output of a layer. Sums and activations stay float32. None: the weights' own dtype. If float32 weights are
            not needed elsewhere, model.to(torch.bfloat16) is as fast as a bfloat16 copy, with half the memory.
        copy: True: the first generation copies the decoder's weights into a layout for few rows and keeps the copy with
            the model; prompts use it too. It takes as much memory as the weights in `dtype`. If the weights are
            unwritten pages of a mapped checkpoint file (from_pretrained in the checkpoint's dtype), their own memory is
            released until something else reads them (a bfloat16 model's forward, prompts of over 512 tokens in all).
            Greedy decoding with a recurrent model also keeps the head in int8, a quarter of its size, to find the
            logits that can be the largest; the token is still chosen from float32 logits. False: weights are read in
            place. This needs no more memory than the model and takes up to a quarter longer. None (the default without
            a call): copy if `dtype` is given, or if the weights' memory can be released; otherwise only the int8 head
            is kept.

    Raises:
        TypeError: for another dtype.
        ValueError: for a dtype with copy=False.
    """
    if dtype not in (*STORAGES, None):
        raise TypeError(f"dtype: wanted torch.float32, torch.bfloat16, torch.int8 or None, got {dtype}")
    if dtype is not None and copy is False:
        raise ValueError(f"dtype: wanted None with copy=False, got {dtype}; use model.to({dtype})")
    state = decoder_state(model)
    state.copies = state.screen = None
    state.storage = None if copy is None and dtype is None else (dtype, copy is not False)


def kept_copies(model: nn.Module) -> DecoderCopies | None:
    """The copies that the last generation kept; None if there are none."""
    return decoder_state(model).copies


def decoder_copies(model: nn.Module, tensors: StepTensors) -> DecoderCopies | None:
    """Copies of the weights `tensors` of the model for a generation; None if they are read in place."""
    state = decoder_state(model)
    copies = state.copies  # read once, as another thread may replace it
    if copies is None or not copies.match(tensors):
        copies = state.copies = None
        dtype, copy = state.storage or (None, mirror_files(tensors.weights()))
        if copy and tensors.weights():  # int8 modules have no weights to copy
            copies = state.copies = DecoderCopies(tensors, dtype)
    return copies


def head_screen(model: nn.Module, head: Projection, copies: DecoderCopies | None) -> HeadScreen | None:
    """A HeadScreen of the head's current weight; None if it does not pay off or set_weight_storage forbids its memory.
    copies: the result of decoder_copies for this generation."""
    state, weight = decoder_state(model), head.weights[0]
    dtype, copy = state.storage or (None, True)
    if not copy or dtype not in (None, torch.float32) or len(head.weights) != 1 or head.transposed:
        return None
    if not isinstance(weight, torch.Tensor) or weight.dtype != torch.float32 or weight.stride(-1) != 1:
        return None
    if weight.nbytes < _WORTH:
        return None
    screen = state.screen
    if screen is None or not screen.match(weight, copies):
        try:
            screen = state.screen = HeadScreen(weight)
        except ValueError:  # not finite
            screen = state.screen = None
    return screen
