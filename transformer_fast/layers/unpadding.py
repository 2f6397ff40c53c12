"""Dropping padding: which positions of a batch are computed, and the way there and back. And documents in a row."""

import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..ops import concrete, parallel

__all__ = [
    "Unpadding",
    "compute_padding",
    "documents_of",
    "padding_is_computed",
    "plan_documents",
    "plan_unpadding",
    "positions_kept",
    "spread_in_use",
]

_TORCH = "torch.distributed.tensor.experimental._context_parallel._attention"


def spread_in_use() -> Any:
    """The context_parallel over more than one process that is in use (see distributed), or None."""
    found = parallel.current()
    if found is None and not torch.compiler.is_compiling() and _TORCH in sys.modules:
        found = importlib.import_module("..distributed", __package__).current()
    return None if found is None or found.size == 1 else found


@dataclass
class Unpadding:
    """The computed positions of a (batch, length) batch, row after row.

    index: (total,) int64 into the flattened batch * length positions, or None when every position is computed (then
    rows stay (batch, length, ...)). cu_seqlens: (batch + 1,) int32, where each sequence begins; max_seqlen: the
    longest. key_mask: bool, (batch, 1, 1, max_seqlen), False for computed positions that nobody attends to; or None.
    mask: bool, (batch, length), True for the positions that are attended to; None when all are.
    kept: bool, (batch, length), when all positions are computed only because lengths cannot be read: True where they
    would have been computed.
    documents: every position is computed, and the sequences of cu_seqlens are documents, several in a row of the batch.
    spread: the context_parallel of which this is one process's part; then every position of it is computed.
    """

    batch: int
    length: int
    index: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    max_seqlen: int = 0
    key_mask: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    kept: torch.Tensor | None = None
    documents: bool = False
    spread: Any = None

    def unpad(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, length, ...) -> (total, ...); x itself when every position is computed."""
        if self.index is None:
            return x
        return x.flatten(0, 1) if self.documents else x.flatten(0, 1).index_select(0, self.index)

    def pad(self, rows: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
        """(total, ...) -> (batch, length, ...), `fill` at positions that were not computed."""
        if self.index is None:
            return rows if self.kept is None else rows.masked_fill(~self.kept[..., None], fill)
        if self.documents:
            return rows.unflatten(0, (self.batch, self.length))
        # From a plain fresh tensor the copy is in place, with a gradient to rows alone.
        out = rows.new_full((self.batch * self.length, *rows.shape[1:]), fill)
        return out.index_copy_(0, self.index, rows).unflatten(0, (self.batch, self.length))

    def show(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows as (batch, length, ...), rows) to return as a hidden state and to go on with: with gradients on, what
        follows is made of what is returned, so that its gradient reaches it."""
        shown = self.pad(rows)
        return shown, self.unpad(shown) if torch.is_grad_enabled() else rows

    def first(self, rows: torch.Tensor) -> torch.Tensor:
        """The first position of each sequence, (batch, ...)."""
        if not self.length:
            raise ValueError(f"input_ids: wanted at least one position to pool, got shape {(self.batch, self.length)}")
        if self.spread is not None:
            return self.spread.first(rows)
        if self.index is None:
            return rows[:, 0]
        if self.documents:
            return rows[:: self.length]
        return rows.index_select(0, self.cu_seqlens[:-1])  # type: ignore[index]

    def positions(self, device: torch.device) -> torch.Tensor:
        """The column of each computed position: (total,), or (length,) when all are."""
        return self.columns(device) if self.index is None else self.index % self.length

    def columns(self, device: torch.device) -> torch.Tensor:
        """(length,): where the columns of the batch stand in the sequence."""
        if self.spread is not None:
            return self.spread.positions(self.length, device)
        return torch.arange(self.length, device=device)


_padding_is_computed = False


class compute_padding:
    """Compute what stands at padded positions, as transformers does, in place of zeros.

    compute_padding(True) switches it on and compute_padding(False) off again; `with compute_padding(True):` switches it
    for the block. Process-wide. Costs what padding costs: dropping it is most of the gain on ragged batches.

    Args:
        on: whether padding is computed from now on.

    Raises:
        TypeError: on is not a bool.

    Examples:
        >>> import torch, transformer_fast
        >>> from transformer_fast.demo import locate
        >>> model = transformer_fast.AutoModel.from_pretrained(locate())
        >>> mask = torch.tensor([[1, 1, 0]])
        >>> with transformer_fast.compute_padding(True):
        ...     hidden = model(torch.tensor([[101, 102, 0]]), attention_mask=mask).last_hidden_state
        >>> bool((hidden[0, 2] == 0).all())
        False
    """

    def __init__(self, on: bool = True):
        global _padding_is_computed
        if not isinstance(on, bool):
            raise TypeError(f"on: wanted True or False, got {on!r}")
        self._before, _padding_is_computed = _padding_is_computed, on

    def __enter__(self) -> "compute_padding":
        return self

    def __exit__(self, *error) -> None:
        global _padding_is_computed
        _padding_is_computed = self._before


def padding_is_computed() -> bool:
    return _padding_is_computed


def plan_unpadding(mask: torch.Tensor, read: torch.Tensor | None = None, read_first: bool = False) -> Unpadding:
    """A Unpadding of the positions where mask holds, and of those whose result is read though they are padding.

    mask: (B, S) bool, True for tokens. read: (B, S) bool or None. read_first: the first position of every sequence is
    read. Padding that is read is computed as a query and never attended to, as in a padded batch.
    Waits for the device once: for the lengths. Where they cannot be read (torch.export, torch.jit.trace, fake tensors,
    torch.compile with fullgraph=True) every position is computed.
    """
    if torch.compiler.is_compiling() and _in_one_graph():
        return _computing_all(mask, positions_kept(mask, read, read_first))
    return _plan_unpadding(mask, read, read_first)


def positions_kept(mask: torch.Tensor, read: torch.Tensor | None, read_first: bool) -> torch.Tensor:
    """(B, S) bool: what plan_unpadding computes of its arguments."""
    keep = mask if read is None else mask | read
    if read_first and mask.shape[1]:
        keep = torch.cat((torch.ones_like(keep[:, :1]), keep[:, 1:]), 1)
    return keep


def _computing_all(mask: torch.Tensor, kept: torch.Tensor | None) -> Unpadding:
    return Unpadding(mask.shape[0], mask.shape[1], key_mask=mask[:, None, None], mask=mask, kept=kept)


@torch.compiler.assume_constant_result
def _in_one_graph() -> bool:
    """Whether the compiler that is tracing refuses to break the graph. Where torch does not say, it may."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        tracer: Any = InstructionTranslator.current_tx()
        return bool(tracer.one_graph or tracer.error_on_graph_break)
    except (ImportError, AttributeError):
        return True


@torch.compiler.disable
def _plan_unpadding(mask: torch.Tensor, read: torch.Tensor | None, read_first: bool) -> Unpadding:
    batch, length = mask.shape
    keep = positions_kept(mask, read, read_first)
    if not concrete(mask):
        return _computing_all(mask, keep)
    lengths = keep.sum(1, dtype=torch.int32)
    *sizes, padding_read = torch.cat((lengths, (keep & ~mask).any().to(torch.int32).view(1))).tolist()
    total, longest = sum(sizes), max(sizes, default=0)
    if total == batch * length:
        return (
            Unpadding(batch, length, key_mask=mask[:, None, None], mask=mask)
            if padding_read
            else Unpadding(batch, length)
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
    return Unpadding(batch, length, index, cu, longest, key_mask, mask)


# ---- documents: several sequences in one row, which do not see one another ----------------------------
def documents_of(
    shape: tuple[int, int], position_ids: torch.Tensor | None, options: Mapping[str, Any]
) -> torch.Tensor | None:
    """(batch, length) int: the document that each position is in, as transformers' DataCollatorWithFlattening says it;
    None where nothing says that there is more than one in a row.

    position_ids: (batch or 1, length) or None: a document begins wherever they do not go on by one. options: a
    forward's other keywords, of which cu_seq_lens_q (documents + 1,), counted through all rows, or seq_idx
    (batch, length) count first. Raises ValueError for cu_seq_lens_q that do not end with the last position, and
    NotImplementedError for documents in a row that is spread over processes.
    """
    batch, length = shape
    ends, numbers = options.get("cu_seq_lens_q"), options.get("seq_idx")
    if (spread := spread_in_use()) is not None:
        _check_one_document(spread, length, position_ids, ends is not None or numbers is not None)
        return None
    if ends is not None:
        ends = torch.as_tensor(ends)
        readable = concrete(ends) and not torch.compiler.is_compiling()
        if ends.dim() != 1 or (readable and int(ends[-1]) != batch * length):
            came = f"up to {int(ends[-1])}" if ends.dim() == 1 else f"shape {tuple(ends.shape)}"
            raise ValueError(f"cu_seq_lens_q: wanted (documents + 1,) from 0 up to {batch * length}, got {came}")
        row = torch.arange(batch * length, device=ends.device)
        return torch.bucketize(row, ends[1:-1].to(row.dtype), right=True).view(batch, length)
    if numbers is not None:
        return numbers.expand(batch, length)
    if position_ids is None or not length:
        return None
    goes_on = position_ids.diff(dim=-1) == 1
    if not torch.compiler.is_compiling() and concrete(goes_on) and bool(goes_on.all()):
        return None
    return torch.nn.functional.pad((~goes_on).cumsum(-1), (1, 0)).expand(batch, length)


def _check_one_document(spread: Any, length: int, position_ids: torch.Tensor | None, told: bool) -> None:
    if not told and position_ids is not None and concrete(position_ids):
        from_first = position_ids - spread.positions(length, position_ids.device)
        told = bool((from_first != from_first[..., :1]).any())
    if told:
        raise NotImplementedError(
            "position_ids, cu_seq_lens_q, seq_idx: wanted one sequence a row under context_parallel, with position_ids "
            "as shard_batch makes them, got several documents"
        )


def plan_documents(documents: torch.Tensor) -> Unpadding:
    """A Unpadding of all positions in which each document is a sequence. documents: (B, S), see documents_of."""
    batch, length = documents.shape
    begins = torch.nn.functional.pad(documents.diff(dim=-1) != 0, (1, 0), value=True).flatten()
    starts = begins.nonzero().squeeze(1)
    cu = torch.nn.functional.pad(starts, (0, 1), value=batch * length)
    index = torch.arange(batch * length, device=documents.device)
    return Unpadding(batch, length, index, cu.to(torch.int32), int(cu.diff().max()), documents=True)
