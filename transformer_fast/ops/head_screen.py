"""Bounds on the logits from an int8 copy of the head, which rule out most tokens for greedy decoding. Reading the int8
copy takes a quarter of the bytes of the float32 head."""

import weakref
from typing import Any

import torch

from ..backends import memory
from ..backends.contents import Contents, FileMappings
from .linear_int8 import GROUP, Int8Weight, quantize_weight

__all__ = ["HeadScreen"]

_PANEL = 32
_nothing: Any = lambda: None  # noqa: E731, stands for a dead weak reference
_PAST = -1e38  # bias of the padding columns after the last output


class HeadScreen:
    """Bounds on the outputs of a float32 weight (out, in): |x . w - x8 . w8| <= |x| |w - w8| + |x - x8| |w8|, where x8
    and w8 are x and w in int8. To find the largest output, an output need not be computed if its upper bound is below
    the lower bound of another.

    panels is w8 in the layout of the kernels. The screen does not follow later changes of the weight: check `match`.
    Raises ValueError if the weight is not finite, RuntimeError without the native library.
    """

    def __init__(self, weight: torch.Tensor):
        weight = weight.detach()
        self._contents, self._copies = Contents(), _nothing
        self._contents.note([weight], FileMappings())
        q, scale = quantize_weight(weight)
        made = Int8Weight(q, scale).data
        if made is None:
            raise RuntimeError("the native library is missing")
        self.panels = made
        out, inner = weight.shape
        error, size = torch.zeros(out), torch.zeros(out)
        for group, begin in enumerate(range(0, inner, GROUP)):
            near = q[:, begin : begin + GROUP] * scale[:, group : group + 1]
            size += near.square().sum(1)
            error += near.sub_(weight[:, begin : begin + GROUP]).square_().sum(1)
        size.sqrt_().mul_(1.0001), error.sqrt_().mul_(1.0001)
        error += (size + error) * ((inner + 16) * 2.0**-23)  # rounding errors of the products themselves
        self._bounds = torch.zeros(3, made.shape[0] * _PANEL)
        self._bounds[0, out:] = _PAST
        self._bounds[1, :out], self._bounds[2, :out] = error, size
        self.out = out

    def match(self, weight: torch.Tensor, copies: Any = None) -> bool:
        """True if a screen made of the weight now would be the same. copies: the decoder's DecoderCopies, if they have
        just been found to match the weights. If they are those of the last check, the weight is not read again."""
        if copies is None or self._copies() is not copies:
            if not self._contents.same([weight.detach()]):
                return False
            self._copies = _nothing if copies is None else weakref.ref(copies)
        return True

    @property
    def nbytes(self) -> int:
        return self.panels.nbytes + self._bounds.nbytes

    def bounds(self, bias: torch.Tensor | None) -> torch.Tensor:
        """(3, columns) float32: bias, |w - w8| and |w8| of each column of the panels."""
        if bias is None:
            return self._bounds
        found = memory.empty_like(self._bounds).copy_(self._bounds)
        found[0, : self.out] = bias
        return found
