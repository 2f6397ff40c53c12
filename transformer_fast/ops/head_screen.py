"""Which of a head's outputs can be the largest: bounds from its int8 form, a quarter of the bytes that a step reads."""

import weakref
from typing import Any

import torch

from ..backends import memory
from ..backends.contents import Contents, FileMappings
from .linear_int8 import GROUP, Int8Weight, quantize_weight

__all__ = ["HeadScreen"]

_PANEL = 32
_nothing: Any = lambda: None  # noqa: E731, a weak reference to nothing
_PAST = -1e38  # start of the columns past the last output


class HeadScreen:
    """Of a float32 weight (out, in): |x . w - x8 . w8| <= |x| |w - w8| + |x - x8| |w8|, where x8 and w8 are x and w in
    int8. An output whose upper bound is under another's lower one need not be computed to find the largest.

    panels: w8 as the kernels read it. It does not follow later changes of the weight: ask match. Raises ValueError
    where the weight is not finite, RuntimeError without the native library.
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
        error += (size + error) * ((inner + 16) * 2.0**-23)  # what the products themselves round
        self._bounds = torch.zeros(3, made.shape[0] * _PANEL)
        self._bounds[0, out:] = _PAST
        self._bounds[1, :out], self._bounds[2, :out] = error, size
        self.out = out

    def match(self, weight: torch.Tensor, copies: Any = None) -> bool:
        """True when the screen of the weight as it is now would be the same. copies: the decoder's, found just now to
        be those of the weights as they are: the copies of an earlier question are answer enough."""
        if copies is None or self._copies() is not copies:
            if not self._contents.same([weight.detach()]):
                return False
            self._copies = _nothing if copies is None else weakref.ref(copies)
        return True

    @property
    def nbytes(self) -> int:
        return self.panels.nbytes + self._bounds.nbytes

    def bounds(self, bias: torch.Tensor | None) -> torch.Tensor:
        """(3, columns): bias, |w - w8| and |w8| of each column of the panels."""
        if bias is None:
            return self._bounds
        found = memory.empty_like(self._bounds).copy_(self._bounds)
        found[0, : self.out] = bias
        return found
