"""Disentangled attention (DeBERTa). A score has content-to-content, content-to-position and position-to-content
terms."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .. import ops
from .projection import dropout_p, linear, projections
from .spec import LayerWeights
from .unpadding import Unpadding

__all__ = ["Disentangled"]


class _Group(NamedTuple):
    """Sequences of similar lengths, padded to the longest of them.

    shape: (b, s). lengths: (b,) int32, or None if all are s. mask: (b, 1, 1, s) bool, True for keys that are attended
    to; used in place of lengths.
    """

    shape: tuple[int, int]
    lengths: torch.Tensor | None
    mask: torch.Tensor | None


@dataclass
class Disentangled:
    """The state of disentangled attention that all layers of one forward pass share.

    score(i, j) = scale * (q_i k_j + q_i K(i - j) + k_j Q(i - j)). K and Q are projections of the row of the distance
    table for i - j. The second term needs the slot position_key in the layer, the third position_query.

    places: (2 L - 1,) int64, the row of the table for each distance -(L - 1) .. L - 1, with L the length of the longest
    sequence. first, last: the smallest and the largest of these rows, if known. weighted: compute the score matrix,
    because the weights are returned. This is also done if padding is computed, because a padded query averages over the
    whole row, as in HF.

    Source: He et al., "DeBERTa: Decoding-enhanced BERT with Disentangled Attention", 2021, section 3.1.
    """

    unpadding: Unpadding
    places: torch.Tensor
    first: int = 0
    last: int | None = None
    weighted: bool = False
    _groups: list[_Group] | None = None
    _rows: torch.Tensor | None = None  # the unpadded row of each row of the concatenated groups
    _order: torch.Tensor | None = None  # for each unpadded row, its index in the concatenated groups

    def __post_init__(self):
        unpadding = self.unpadding
        self.weighted = self.weighted or (unpadding.index is None and unpadding.mask is not None)
        if unpadding.index is not None and not self.weighted:
            self._groups, self._rows, self._order = _grouped(unpadding)

    def attend(
        self, w: LayerWeights, x: torch.Tensor, table: torch.Tensor | None, heads: tuple[int, int], scale: float,
        weights: dict[int, torch.Tensor] | None, index: int,
    ) -> torch.Tensor:  # fmt: skip
        """x: (B, S, E) or unpadded (total, E) -> (..., H * D). table: (rows, E), the embeddings of the distances.
        weights: receives the attention weights of layer `index`, (B, H, S, S)."""
        q, k, v = (t.unflatten(-1, heads) for t in projections([w.query, w.key, w.value], x))
        keys, queries = self._of_distances(w, table, heads, scale)
        p = dropout_p(w.attention_dropout)
        if self.weighted:
            q, k, v = (self.unpadding.pad(t) for t in (q, k, v))
            out = self._weighted(q, k, v, keys, queries, scale, p, weights, index)
            return self.unpadding.unpad(out).flatten(-2)
        if self._groups is None:
            return _attend(q, k, v, keys, queries, scale, p, None, None).flatten(-2)
        if not self._groups:  # there are no tokens
            return q.flatten(-2)
        sizes = [b * s for (b, s), *_ in self._groups]
        parts = zip(*(t.index_select(0, self._rows).split(sizes) for t in (q, k, v)))  # type: ignore[arg-type]
        found = []
        for group, rows in zip(self._groups, parts):
            padded = [t.unflatten(0, group.shape) for t in rows]
            found.append(
                _attend(padded[0], padded[1], padded[2], keys, queries, scale, p, group.lengths, group.mask).flatten(
                    0, 1
                )
            )
        return torch.cat(found).index_select(0, self._order).flatten(-2)  # type: ignore[arg-type]

    def _of_distances(self, w: LayerWeights, table, heads, scale: float):
        """K and Q, multiplied by scale, (H, 2 L - 1, D) each, or None. K is in descending order of distances, Q in
        ascending order."""
        if table is None:
            return None, None
        if self.last is not None:  # short sequences read few rows of the table
            table = table[self.first : self.last + 1]
        rows = ops.dropout(table, dropout_p(w.position_dropout))
        places = self.places - self.first
        found: list[torch.Tensor | None] = []
        for module, order in ((w.position_key, places.flip(0)), (w.position_query, places)):
            if module is None:
                found.append(None)
                continue
            part = (linear(module, rows) * scale).index_select(0, order)
            found.append(part.unflatten(-1, heads).transpose(0, 1))
        return found

    def _weighted(self, q, k, v, keys, queries, scale: float, p: float, weights, index: int) -> torch.Tensor:
        """q, k, v: (B, S, H, D)."""
        scores = q.transpose(1, 2) @ (k.permute(0, 2, 3, 1) * scale)
        bias = _bias(q, k, keys, queries)
        scores = scores if bias is None else scores + bias
        if self.unpadding.mask is not None:
            together = self.unpadding.mask[:, None, :, None] & self.unpadding.mask[:, None, None]
            # The least finite number, not -inf: a padded query then averages over all keys.
            scores = scores.masked_fill(~together, torch.finfo(scores.dtype).min)
        found = scores.softmax(-1)
        if weights is not None:
            weights[index] = found
        return (ops.dropout(found, p) @ v.transpose(1, 2)).transpose(1, 2)


def _attend(q, k, v, keys, queries, scale: float, p: float, lengths, mask) -> torch.Tensor:
    """q, k, v: (B, S, H, D) -> (B, S, H, D)."""
    bias = _bias(q, k, keys, queries)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = ops.scaled_dot_product_attention(q, k, v, mask, p, False, scale, bias=bias, key_lengths=lengths)
    return out.transpose(1, 2)


def _bias(q: torch.Tensor, k: torch.Tensor, keys, queries) -> torch.Tensor | None:
    """The terms of the scores that depend on distances, (B, H, S, S). q, k: (B, S, H, D); keys, queries: from
    _of_distances."""
    batch, length, total = q.shape[0], q.shape[1], None
    for rows, table, across in ((q, keys, False), (k, queries, True)):
        if table is None:
            continue
        longest = (table.shape[1] + 1) // 2
        table = table[:, longest - length : longest + length - 1]
        products = torch.bmm(rows.flatten(0, 1).transpose(0, 1), table.transpose(1, 2))  # (H, B * S, 2 S - 1)
        part = _shifted(products.unflatten(1, (batch, length)))
        part = part.transpose(-1, -2) if across else part
        total = part if total is None else total + part
    return None if total is None else total.transpose(0, 1)


def _shifted(x: torch.Tensor) -> torch.Tensor:
    """(..., S, 2 S - 1) -> (..., S, S), a view: S columns of row i, starting at column S - 1 - i."""
    length = x.shape[-2]
    if not length:
        return x[..., :0]
    flat = x.flatten(-2)[..., length - 1 : length - 1 + length * (2 * length - 2)]
    return x if length == 1 else flat.unflatten(-1, (length, 2 * length - 2))[..., :length]


@torch.compiler.disable
def _grouped(unpadding: Unpadding) -> tuple[list[_Group], torch.Tensor, torch.Tensor]:
    """Group the sequences of an Unpadding by length. Returns the fields _groups, _rows and _order of Disentangled."""
    cu: Any = unpadding.cu_seqlens
    device, step = cu.device, 16 if cu.device.type == "cpu" else 64
    starts = cu.tolist()
    by_length: dict[int, list[int]] = {}
    for sequence, (begin, end) in enumerate(zip(starts, starts[1:])):
        if end > begin:
            by_length.setdefault(-(-(end - begin) // step), []).append(sequence)
    groups, chosen_rows, order, before = [], [], torch.empty(starts[-1], dtype=torch.int64, device=device), 0
    lengths = cu.diff()
    for members in by_length.values():
        chosen = torch.tensor(members, device=device)
        longest = max(starts[m + 1] - starts[m] for m in members)
        even = all(starts[m + 1] - starts[m] == longest for m in members)
        column, own = torch.arange(longest, device=device), lengths[chosen]
        rows = (cu[chosen].long()[:, None] + torch.minimum(column, own[:, None] - 1)).flatten()
        real = (column < own[:, None]).flatten().nonzero().squeeze(1)
        order[rows[real]] = real + before
        chosen_rows.append(rows)
        before += len(rows)
        mask = None
        if unpadding.key_mask is not None:
            mask = unpadding.key_mask[chosen, :, :, :longest] & (column < own[:, None])[:, None, None]
        lengths_told = None if even or mask is not None else own.to(torch.int32)
        groups.append(_Group((len(members), longest), lengths_told, mask))
    return groups, torch.cat(chosen_rows) if chosen_rows else order, order
