"""Attention of one process's queries to another's keys, split into blocks that the kernels can compute."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..backends.specs import AttentionSpec
from ..ops import RelativeBias
from .layout import Layout

__all__ = ["Block", "Rows", "blocks", "narrow_bias", "sub_call"]

_Part = tuple[int, int]  # a range of rows: first, one past the last


class Block(NamedTuple):
    """A range of query rows and a range of key columns. left, right: the window, relative to the block's own row and
    column numbers, -1: no limit. shift: the position of the first row minus the position of the first column. start:
    the position of the first column."""

    rows: _Part
    columns: _Part
    left: int
    right: int
    shift: int = 0
    start: int = 0


def is_plain(spec: AttentionSpec, by_column: bool) -> bool:
    """Whether masks depend on the order of positions only, not on distances: then blocks can have all rows of a
    process."""
    return spec.window_left < 0 and spec.window_right <= 0 and spec.relative_bias is None and not by_column


def blocks(spec: AttentionSpec, layout: Layout, rank: int, source: int, by_column: bool) -> Iterator[Block]:
    """The blocks that `rank` computes with the keys of `source`. by_column: masks have a column for every position."""
    queries, keys = _length(spec.query), _length(spec.key)
    if is_plain(spec, by_column):
        yield from _plain(spec, layout, rank, source, queries, keys)
        return
    long_q, long_k = queries // len(layout.of(rank)), keys // len(layout.of(rank))
    for i, a in enumerate(layout.of(rank)):
        for j, b in enumerate(layout.of(source)):
            found = _near(spec, a * long_q - b * long_k, long_q, long_k)
            if found is not None:
                rows, columns, left, right = found
                yield Block(
                    (i * long_q + rows[0], i * long_q + rows[1]),
                    (j * long_k + columns[0], j * long_k + columns[1]),
                    left, right, a * long_q + rows[0] - b * long_k - columns[0], b * long_k + columns[0],
                )  # fmt: skip


def _length(t: torch.Tensor) -> int:
    return t.shape[0] if t.dim() == 3 else t.shape[2]


def _plain(spec, layout: Layout, rank: int, source: int, queries: int, keys: int) -> Iterator[Block]:
    causal = spec.window_right == 0
    rows, columns = (0, queries), (0, keys)
    if not causal or source == rank:
        yield Block(rows, columns, -1, 0 if causal else -1)
    elif not layout.balanced:
        if source < rank:
            yield Block(rows, columns, -1, -1)
    elif source < rank:
        yield Block(rows, (0, keys // 2), -1, -1)
    else:
        yield Block((queries // 2, queries), columns, -1, -1)


def _near(spec, shift: int, queries: int, keys: int) -> tuple[_Part, _Part, int, int] | None:
    """(rows, columns, left, right): the parts of two chunks that the window covers; None if it covers none."""
    left = spec.window_left + (-shift if spec.window_left >= 0 else 0)
    right = spec.window_right + (shift if spec.window_right >= 0 else 0)
    rows, columns = (0, queries), (0, keys)
    if spec.window_left >= 0 and left < 0:  # no query sees the first keys
        columns = (-left, keys)
        right, left = right + left if spec.window_right >= 0 else -1, 0
    elif spec.window_right >= 0 and right < 0:  # the first queries see none of these keys
        rows = (-right, queries)
        left, right = left + right if spec.window_left >= 0 else -1, 0
    if rows[0] >= rows[1] or columns[0] >= columns[1]:
        return None
    if spec.window_left < 0 or left >= queries:
        left = -1
    if spec.window_right < 0 or right >= keys:
        right = -1
    return rows, columns, left, right


class Rows:
    """Reads and writes ranges of rows: slices of padded tensors, halves of each sequence in unpadded ones."""

    def __init__(self, cu_seqlens: torch.Tensor | None, length: int, longest: int):
        self.cu, self.length, self.longest = cu_seqlens, length, longest
        if cu_seqlens is None:
            return
        row = torch.arange(length, device=cu_seqlens.device)
        sequence = torch.bucketize(row, cu_seqlens[1:].to(row.dtype), right=True)
        middle = (cu_seqlens[:-1] + cu_seqlens[1:]) // 2
        self._late = row >= middle[sequence]

    def _index(self, part: _Part) -> torch.Tensor:
        return (self._late if part[0] else ~self._late).nonzero().squeeze(1)

    def take(self, t: torch.Tensor, part: _Part, dim: int) -> torch.Tensor:
        if part == (0, self.length):
            return t
        if self.cu is None:
            return t.narrow(dim, part[0], part[1] - part[0])
        return t.index_select(dim, self._index(part))

    def put(self, t: torch.Tensor, part: _Part, dim: int, values: torch.Tensor) -> None:
        if part == (0, self.length):
            t.copy_(values)
        elif self.cu is None:
            t.narrow(dim, part[0], part[1] - part[0]).copy_(values)
        else:
            t.index_copy_(dim, self._index(part), values)

    def add(self, t: torch.Tensor, part: _Part, dim: int, values: torch.Tensor) -> None:
        self.put(t, part, dim, self.take(t, part, dim) + values)

    def bounds(self, part: _Part) -> tuple[torch.Tensor | None, int]:
        """(cu_seqlens, longest sequence) of a part."""
        if self.cu is None:
            return None, part[1] - part[0]
        if part == (0, self.length):
            return self.cu, self.longest
        return self.cu // 2, (self.longest + 1) // 2


def _slice_mask(t: torch.Tensor | None, block: Block, travels: bool) -> torch.Tensor | None:
    """The rows and columns of a block in a 4-D mask or bias. travels: it has only the columns of the current keys."""
    if t is None:
        return None
    if t.shape[2] > 1:
        t = t[:, :, block.rows[0] : block.rows[1]]
    if t.shape[3] > 1:
        start = block.columns[0] if travels else block.start
        t = t[..., start : start + block.columns[1] - block.columns[0]]
    return t


def narrow_bias(t: torch.Tensor, block: Block) -> torch.Tensor:
    """The view of a bias, or of its gradient, that belongs to a block."""
    return _slice_mask(t, block, False)  # type: ignore[return-value]


def relative_matrix(spec: AttentionSpec, table: torch.Tensor, block: Block) -> torch.Tensor:
    """T5's bias of a block: (1, H, rows, columns), or (1, H, 1, 1) where all distances share a bucket."""
    relative = RelativeBias(table, spec.relative_max_distance, spec.relative_bidirectional)
    rows, columns = block.rows[1] - block.rows[0], block.columns[1] - block.columns[0]
    # If every distance in the block is at least max_distance, and all on one side, they share the last bucket.
    far = abs(block.shift) - max(rows, columns) >= spec.relative_max_distance
    if far:
        rows = columns = 1
    return relative.matrix(torch.arange(rows, device=table.device) + block.shift, columns)


def sub_call(
    spec: AttentionSpec, block: Block, queries: Rows, keys: Rows, key_value: torch.Tensor, travelling: list, seed: int
) -> AttentionSpec:
    """The call of a block. key_value: (2, *key.shape), the current keys and values. travelling: the key mask and key
    bias that go with them; None where the masks of `spec` apply instead."""
    dim = 0 if spec.cu_seqlens_q is not None else 2
    cu_q, longest_q = queries.bounds(block.rows)
    cu_k, longest_k = keys.bounds(block.columns)
    key, value = (keys.take(t, block.columns, dim) for t in key_value)
    own_mask, own_bias = travelling
    mask = _slice_mask(spec.mask, block, False) if own_mask is None else _slice_mask(own_mask, block, True)
    bias = _slice_mask(spec.bias, block, False) if own_bias is None else _slice_mask(own_bias, block, True)
    table = spec.relative_bias
    if table is not None and block.shift:
        matrix = relative_matrix(spec, table, block)
        bias, table = matrix if bias is None else matrix + bias, None
    rng = spec.rng
    if rng is not None:  # every block has its own random stream
        rng = rng + torch.tensor([seed * 0x9E3779B97F4A7C15 % 2**63, 0], device=rng.device)
    return spec._replace(
        query=queries.take(spec.query, block.rows, dim), key=key, value=value, bias=bias, mask=mask, key_lengths=None,
        cu_seqlens_q=cu_q, cu_seqlens_k=cu_q if cu_k is cu_q else cu_k, max_seqlen_q=longest_q, max_seqlen_k=longest_k,
        relative_bias=table, rng=rng, bottom_right=0, window_left=block.left, window_right=block.right,
    )  # fmt: skip
