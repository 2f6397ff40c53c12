"""Dropping padding: which positions of a batch are computed, and the way there and back."""

from dataclasses import dataclass

import torch

from ..ops import concrete

__all__ = ["Packing", "plan_packing"]


@dataclass
class Packing:
    """The computed positions of a (batch, length) batch, row after row.

    index: (total,) int64 into the flattened batch * length positions, or None when every position is computed (then
    rows stay (batch, length, ...)). cu_seqlens: (batch + 1,) int32, where each sequence begins; max_seqlen: the
    longest. key_mask: bool, (batch, 1, 1, max_seqlen), False for computed positions that nobody attends to; or None.
    mask: bool, (batch, length), True for the positions that are attended to; None when all are.
    kept: bool, (batch, length), when all positions are computed only because lengths cannot be read: True where they
    would have been computed.
    """

    batch: int
    length: int
    index: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    max_seqlen: int = 0
    key_mask: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    kept: torch.Tensor | None = None

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, length, ...) -> (total, ...); x itself when every position is computed."""
        return x if self.index is None else x.flatten(0, 1).index_select(0, self.index)

    def unpack(self, rows: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
        """(total, ...) -> (batch, length, ...), `fill` at positions that were not computed."""
        if self.index is None:
            return rows if self.kept is None else rows.masked_fill(~self.kept[..., None], fill)
        # From a plain fresh tensor the copy is in place, with a gradient to rows alone.
        out = rows.new_full((self.batch * self.length, *rows.shape[1:]), fill)
        return out.index_copy_(0, self.index, rows).unflatten(0, (self.batch, self.length))

    def first(self, rows: torch.Tensor) -> torch.Tensor:
        """The first position of each sequence, (batch, ...)."""
        if not self.length:
            raise ValueError(f"input_ids: wanted at least one position to pool, got shape {(self.batch, self.length)}")
        if self.index is None:
            return rows[:, 0]
        return rows.index_select(0, self.cu_seqlens[:-1])  # type: ignore[index]

    def positions(self, device: torch.device) -> torch.Tensor:
        """The column of each computed position: (total,), or (length,) when all are."""
        if self.index is None:
            return torch.arange(self.length, device=device)
        return self.index % self.length


@torch.compiler.disable
def plan_packing(mask: torch.Tensor, read: torch.Tensor | None = None, read_first: bool = False) -> Packing:
    """A Packing of the positions where mask holds, and of those whose result is read though they are padding.

    mask: (B, S) bool, True for tokens. read: (B, S) bool or None. read_first: the first position of every sequence is
    read. Padding that is read is computed as a query and never attended to, as in a padded batch.
    Waits for the device once: for the lengths. Where they cannot be read (torch.export, torch.jit.trace, fake tensors)
    every position is computed.
    """
    batch, length = mask.shape
    keep = mask
    if read is not None:
        keep = keep | read
    if read_first and length:
        keep = torch.cat((torch.ones_like(keep[:, :1]), keep[:, 1:]), 1)
    if not concrete(mask):
        return Packing(batch, length, key_mask=mask[:, None, None], mask=mask, kept=keep)
    lengths = keep.sum(1, dtype=torch.int32)
    *sizes, padding_read = torch.cat((lengths, (keep & ~mask).any().to(torch.int32).view(1))).tolist()
    total, longest = sum(sizes), max(sizes, default=0)
    if total == batch * length:
        return (
            Packing(batch, length, key_mask=mask[:, None, None], mask=mask) if padding_read else Packing(batch, length)
        )
    index = torch.nonzero_static(keep.flatten(), size=total).squeeze(1)
    cu = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    key_mask = None
    if padding_read:
        row = torch.repeat_interleave(torch.arange(batch, device=mask.device), lengths, output_size=total)
        column = torch.arange(total, device=mask.device) - cu[row]
        key_mask = mask.new_zeros(batch, longest)
        key_mask[row, column] = mask.flatten()[index]
        key_mask = key_mask[:, None, None]
    return Packing(batch, length, index, cu, longest, key_mask, mask)
