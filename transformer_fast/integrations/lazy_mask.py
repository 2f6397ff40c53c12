"""An attention mask given by a rule. It is materialised only where an op reads it; our kernels apply the rule."""

from functools import cached_property
from typing import NamedTuple

import torch
from torch.utils._pytree import tree_map_only

from ..layers.unpadding import Unpadding, plan_documents


class Documents:
    """Several documents per row, which do not attend to one another. numbers: (B, S) int, see layers.documents_of."""

    def __init__(self, numbers: torch.Tensor):
        self.numbers = numbers

    @cached_property
    def unpadding(self) -> Unpadding:
        """The unpadding plan, made once for all layers."""
        return plan_documents(self.numbers)

    def together(self) -> torch.Tensor:
        """(B, 1, S, S) bool: which positions are in the same document."""
        return (self.numbers[:, :, None] == self.numbers[:, None])[:, None]


class MaskRule(NamedTuple):
    """Query i attends to key j if j < reach, j < key_lengths[b], padding[b, j], and
    i + shift - left <= j <= i + shift + right (None: no limit on that side).

    shift: the key position of query 0, which is 0 or, where it matters, reach - Sq.
    padding: (B, reach) bool. key_lengths: (B,) int32; with it, shift is 0 or neither side is limited.
    documents: key j and query i must be in the same document; then Sq == Sk, shift is 0, and there is no padding.
    """

    reach: int
    padding: torch.Tensor | None = None
    key_lengths: torch.Tensor | None = None
    left: int | None = None
    right: int | None = None
    shift: int = 0
    documents: Documents | None = None

    def dense(self, batch: int, queries: int, keys: int, device: torch.device) -> torch.Tensor:
        """The rule as a (B, 1, Sq, Sk) bool mask."""
        j = torch.arange(keys, device=device)
        i = torch.arange(queries, device=device)[:, None] + self.shift
        mask = (j < self.reach).expand(batch, 1, queries, keys)
        if self.left is not None:
            mask = mask & (j >= i - self.left)
        if self.right is not None:
            mask = mask & (j <= i + self.right)
        if self.key_lengths is not None:
            mask = mask & (j < self.key_lengths.view(-1, 1, 1, 1))
        if self.padding is not None:
            padding = torch.nn.functional.pad(self.padding, (0, keys - self.reach))
            mask = mask & padding[:, None, None, :]
        if self.documents is not None:
            mask = mask & self.documents.together()
        return mask.contiguous()


class LazyMask(torch.Tensor):
    """The (B, 1, Sq, Sk) bool tensor of a `MaskRule`, materialised when an op reads it.

    Model code may slice, combine, move or print it and gets the results of the dense tensor. The attention function
    reads `.rule`, which is None once an op returned an alias, because the mask could be written through it.
    """

    rule: MaskRule | None
    _recipe: MaskRule
    _dense: torch.Tensor | None

    @staticmethod
    def __new__(cls, rule: MaskRule, batch: int, queries: int, keys: int, device: torch.device):
        self = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, (batch, 1, queries, keys), dtype=torch.bool, device=device, requires_grad=False
        )
        self.rule = rule
        self._recipe = rule
        self._dense = None
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def dense(self) -> torch.Tensor:
        if self._dense is None:
            b, _, sq, sk = self.shape
            self._dense = self._recipe.dense(b, sq, sk, self.device)
        return self._dense

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        aliases = any(a.alias_info is not None for a in func._schema.arguments)

        def unwrap(mask: LazyMask) -> torch.Tensor:
            dense = mask.dense()
            if aliases:
                mask.rule = None
            return dense

        args, kwargs = tree_map_only(LazyMask, unwrap, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, *, tensor_contents=None) -> str:  # type: ignore[override]
        return f"LazyMask({tuple(self.shape)}, {self._recipe})"

    def __deepcopy__(self, memo) -> torch.Tensor:
        return self.dense().clone()

    def __reduce_ex__(self, protocol):
        return self.dense().__reduce_ex__(protocol)
