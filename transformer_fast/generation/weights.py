"""How decoding on the CPU holds a model's weights: in place, or in copies that are kept between generations."""

import torch
from torch import nn

from ..backends.contents import mirror_files
from ..ops.decoder_step import DecoderCopies, Projection, StepTensors
from ..ops.head_screen import HeadScreen
from ..ops.linear_panel import STORAGES
from .decoder_state import decoder_state

__all__ = ["decoder_copies", "head_screen", "kept_copies", "set_weight_storage"]

_WORTH = 1 << 22  # bytes of a head that is worth a screen


def set_weight_storage(model: nn.Module, dtype: torch.dtype | None = None, *, copy: bool | None = None) -> None:
    """Choose how decoding on the CPU reads model's weights.

    copy: True: the first generation copies the decoder's weights into a layout for few rows and keeps the copy as long
        as the model; prompts use it too. It takes as much memory again as the weights in dtype, except where they
        mirror a checkpoint's mapped file (from_pretrained in the checkpoint's own dtype), unchanged: then their own
        memory is given back until somebody else reads them (a bfloat16 model's own forward, prompts of over 512 tokens
        in all). Greedy decoding with a recurrent model keeps the head in int8 too, a fourth of its memory, to tell from
        that which logits can be the largest; the token is found from float32 logits all the same.
        False: the weights are read where they are: the memory of the model alone, up to a quarter longer.
        None, as without a call: a copy where dtype asks for one or the memory of one is given back, else none but the
        head in int8.
    dtype: of the copy. torch.bfloat16 halves what a step of a float32 model reads and rounds the weights to 8 bits;
        torch.int8 makes it a quarter, round(w / s) with a scale s = max |w| / 127 for each output of a layer. Sums and
        activations stay float32. None: the weights' own. Where the original is not needed in float32,
        model.to(torch.bfloat16) is as fast as a copy in it, for half the memory.

    Each generation asks whether the copy is still one of the weights as they are now, whoever wrote to them (an
    optimizer of any kind, `.data`, numpy, a load, merged adapters, another process), and makes it again if not. Weights
    that mirror a checkpoint's file are known by their pages, else all of them are hashed at the rate at which memory is
    read: 2.5 ms and 50 ms for the 494 MB of gpt2, on a busy AMD EPYC (Zen 5).

    Raises TypeError for another dtype, and ValueError for one without a copy.
    """
    if dtype not in (*STORAGES, None):
        raise TypeError(f"dtype: wanted torch.float32, torch.bfloat16, torch.int8 or None, got {dtype}")
    if dtype is not None and copy is False:
        raise ValueError(f"dtype: weights that are read in place have their own, got {dtype}; use model.to({dtype})")
    state = decoder_state(model)
    state.copies = state.screen = None
    state.storage = None if copy is None and dtype is None else (dtype, copy is not False)


def kept_copies(model: nn.Module) -> DecoderCopies | None:
    """The copies that the last generation has left."""
    return decoder_state(model).copies


def decoder_copies(model: nn.Module, tensors: StepTensors) -> DecoderCopies | None:
    """Copies of the model's weights `tensors` for a generation; None: they are read where they lie."""
    state = decoder_state(model)
    copies = state.copies  # another thread may replace them meanwhile
    if copies is None or not copies.match(tensors):
        copies = state.copies = None
        dtype, copy = state.storage or (None, mirror_files(tensors.weights()))
        if copy and tensors.weights():  # int8 modules have none to copy
            copies = state.copies = DecoderCopies(tensors, dtype)
    return copies


def head_screen(model: nn.Module, head: Projection, copies: DecoderCopies | None) -> HeadScreen | None:
    """What finds the largest logits of the head as it is now from a fourth of its bytes; None where that does not pay,
    or its memory is not to be taken. copies: what decoder_copies has just given."""
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
