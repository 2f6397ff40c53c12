"""Padding removal: which positions of a batch are computed, and conversion between padded and unpadded rows. Also for
several documents in one row."""

import contextlib
import importlib
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..ops import concrete, parallel

__all__ = [
    "Unpadding",
    "compute_padding",
    "documents_of",
    "every_position_computed",
    "padding_is_computed",
    "plan_documents",
    "plan_unpadding",
    "positions_kept",
    "spread_in_use",
]

_TORCH = "torch.distributed.tensor.experimental._context_parallel._attention"


def spread_in_use() -> Any:
    """The active context_parallel over more than one process (see distributed), or None."""
    found = parallel.current()
    if found is None and not torch.compiler.is_compiling() and _TORCH in sys.modules:
        found = importlib.import_module("..distributed", __package__).current()
    return None if found is None or found.size == 1 else found


@dataclass
class Unpadding:
    """The computed positions of a (batch, length) batch, row after row.

    index: (total,) int64 into the flattened batch * length positions; None if every position is computed (then rows
        stay
    (batch, length, ...)). cu_seqlens: (batch + 1,) int32, where each sequence begins. max_seqlen: the length of the
    longest. key_mask: (batch, 1, 1, max_seqlen) bool, False for computed positions that are not attended to; or None.
    mask: (batch, length) bool, True for positions that are attended to; None if all are.
    kept: (batch, length) bool, True for positions that would be computed if lengths could be read; None otherwise.
    hollow: some row of `mask` is False everywhere. blind: the flag that was given to plan_unpadding.
    documents: every position is computed, and the sequences of cu_seqlens are documents, several per batch row.
    spread: the context_parallel of which this is one process's part; then every position is computed.
    """

    batch: int
    length: int
    index: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    max_seqlen: int = 0
    key_mask: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    kept: torch.Tensor | None = None
    hollow: bool = False
    blind: bool = False
    documents: bool = False
    spread: Any = None

    def unpad(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, length, ...) -> (total, ...); x itself if every position is computed."""
        if self.index is None:
            return x
        return x.flatten(0, 1) if self.documents else x.flatten(0, 1).index_select(0, self.index)

    def pad(self, rows: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
        """(total, ...) -> (batch, length, ...), `fill` at positions that were not computed."""
        if self.index is None:
            if self.kept is None:
                return rows
            return rows.masked_fill(~self.kept.view(*self.kept.shape, *[1] * (rows.dim() - 2)), fill)
        if self.documents:
            return rows.unflatten(0, (self.batch, self.length))
        # index_copy_ in place on a fresh tensor: only rows get a gradient.
        out = rows.new_full((self.batch * self.length, *rows.shape[1:]), fill)
        return out.index_copy_(0, self.index, rows).unflatten(0, (self.batch, self.length))

    def show(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(hidden state (batch, length, ...) to return, rows to continue with). With gradients enabled the rows are
        computed from the returned state, so that it gets their gradient."""
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
        """The column of each computed position: (total,), or (length,) if all are computed."""
        return self.columns(device) if self.index is None else self.index % self.length

    def columns(self, device: torch.device) -> torch.Tensor:
        """(length,): the positions in the sequence of the columns of the batch."""
        if self.spread is not None:
            return self.spread.positions(self.length, device)
        return torch.arange(self.length, device=device)


_padding_is_computed = False


class compute_padding:
    """Compute outputs at padded positions, as transformers does. By default they are zeros.

    compute_padding(True) switches this on for the whole process, compute_padding(False) off again. As a context manager
    it applies to the block. It costs most of the speed gain on ragged batches, which comes from dropping padding.

    Args:
        on: whether padding is computed from now on.

    Raises:
        TypeError: if `on` is not a bool.

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


_computing: set[int] = set()  # the threads inside every_position_computed


@contextlib.contextmanager
def every_position_computed() -> Iterator[None]:
    """Padding is computed in this context and thread."""
    thread = threading.get_ident()
    outermost = thread not in _computing
    _computing.add(thread)
    try:
        yield
    finally:
        if outermost:
            _computing.discard(thread)


def padding_is_computed() -> bool:
    if torch.compiler.is_compiling() or not _computing:
        return _padding_is_computed
    return _padding_is_computed or threading.get_ident() in _computing


def plan_unpadding(
    mask: torch.Tensor,
    read: torch.Tensor | None = None,
    read_first: bool = False,
    blind: torch.Tensor | None = None,
) -> Unpadding:
    """An Unpadding of the positions where mask is True, and of padding whose result is read.

    mask: (B, S) bool, True for tokens. read: (B, S) bool, True for positions whose result is read; or None. read_first:
    the first position of every sequence is read. Padding that is read is computed as a query and never attended to, as
    in a padded batch. blind: () bool, or None; it is read with the lengths. It synchronises once, for the lengths. If
    they cannot be read (torch.export, torch.jit.trace, fake tensors, torch.compile with fullgraph=True) every position
    is computed.
    """
    if torch.compiler.is_compiling() and _in_one_graph():
        return _computing_all(mask, positions_kept(mask, read, read_first))
    return _plan_unpadding(mask, read, read_first, blind)


def positions_kept(mask: torch.Tensor, read: torch.Tensor | None, read_first: bool) -> torch.Tensor:
    """(B, S) bool: the positions that plan_unpadding with these arguments computes."""
    keep = mask if read is None else mask | read
    if read_first and mask.shape[1]:
        keep = torch.cat((torch.ones_like(keep[:, :1]), keep[:, 1:]), 1)
    return keep


def _computing_all(mask: torch.Tensor, kept: torch.Tensor | None) -> Unpadding:
    return Unpadding(mask.shape[0], mask.shape[1], key_mask=mask[:, None, None], mask=mask, kept=kept)


@torch.compiler.assume_constant_result
def _in_one_graph() -> bool:
    """Whether the compiler that is tracing refuses graph breaks. If torch does not tell, assume that it does."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        tracer: Any = InstructionTranslator.current_tx()
        return bool(tracer.one_graph or tracer.error_on_graph_break)
    except (ImportError, AttributeError):
        return True


@torch.compiler.disable
def _plan_unpadding(
    mask: torch.Tensor, read: torch.Tensor | None, read_first: bool, blind: torch.Tensor | None
) -> Unpadding:
    batch, length = mask.shape
    keep = positions_kept(mask, read, read_first)
    if not concrete(mask):
        return _computing_all(mask, keep)
    lengths = keep.sum(1, dtype=torch.int32)
    flags = [(keep & ~mask).any(), ~mask.any(1).all(), *([] if blind is None else [blind])]
    found = torch.cat((lengths, torch.stack(flags).to(torch.int32))).tolist()
    sizes, (padding_read, hollow, *blinded) = found[:batch], map(bool, found[batch:])
    state: dict[str, Any] = {"hollow": hollow and bool(length), "blind": any(blinded)}
    total, longest = sum(sizes), max(sizes, default=0)
    if total == batch * length:
        return (
            Unpadding(batch, length, key_mask=mask[:, None, None], mask=mask, **state)
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
    return Unpadding(batch, length, index, cu, longest, key_mask, mask, **state)


# ---- documents: several independent sequences in one row -----------------------------------------------
def documents_of(
    shape: tuple[int, int], position_ids: torch.Tensor | None, options: Mapping[str, Any]
) -> torch.Tensor | None:
    """(batch, length) int: the document of each position, from inputs in the form of transformers'
    DataCollatorWithFlattening. None if there is nothing that means several documents per row.

    position_ids: (batch or 1, length) or None; a document begins wherever they do not increase by one. options: the
    forward's other keywords. Of these, cu_seq_lens_q (documents + 1,), counted through all rows, or else seq_idx
    (batch, length), takes precedence over position_ids. Raises ValueError for cu_seq_lens_q that do not end at the last
    position, and NotImplementedError for several documents per row under context_parallel.
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
            "position_ids, cu_seq_lens_q, seq_idx: wanted one sequence per row under context_parallel, with "
            "position_ids as shard_batch makes them, got several documents"
        )


def plan_documents(documents: torch.Tensor) -> Unpadding:
    """An Unpadding of all positions, with each document as a sequence. documents: (B, S), see documents_of."""
    batch, length = documents.shape
    begins = torch.nn.functional.pad(documents.diff(dim=-1) != 0, (1, 0), value=True).flatten()
    starts = begins.nonzero().squeeze(1)
    cu = torch.nn.functional.pad(starts, (0, 1), value=batch * length)
    index = torch.arange(batch * length, device=documents.device)
    return Unpadding(batch, length, index, cu.to(torch.int32), int(cu.diff().max()), documents=True)
