"""Which positions of a sequence each process has."""

from typing import NamedTuple

import torch

__all__ = ["Layout"]


class Layout(NamedTuple):
    """`size` processes have parts of equal length. balanced: 2 * size chunks in zigzag order, process r has chunks r
    and 2 * size - 1 - r, so that all have equal work under a causal mask; else process r has chunk r of `size`.

    Source: Brandon et al., "Striped Attention", 2023, for the imbalance; zigzag as in Llama 3 (Dubey et al., 2024,
    section 3.3.2).
    """

    size: int
    balanced: bool

    @property
    def chunks(self) -> int:
        return 2 * self.size if self.balanced else self.size

    def of(self, rank: int) -> tuple[int, ...]:
        """The chunk numbers of a process, ascending."""
        return (rank, 2 * self.size - 1 - rank) if self.balanced else (rank,)

    def part_length(self, name: str, length: int) -> int:
        """The length of each process's part; ValueError if the chunks are not of equal length."""
        if length % self.chunks:
            raise ValueError(
                f"{name}: wanted a length that {self.chunks} divides ({self.size} processes"
                f"{', two chunks each' if self.balanced else ''}), got {length}; pad it"
            )
        return length // self.size

    def positions(self, rank: int, part: int, device: torch.device | None = None) -> torch.Tensor:
        """(part,) int64: the positions in the whole sequence of a process's rows."""
        chunks = self.of(rank)
        chunk = part // len(chunks)
        return torch.cat([torch.arange(c * chunk, (c + 1) * chunk, device=device) for c in chunks])

    def unpadded_rows(self, rank: int, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """The same for unpadded sequences, each of which is split: row numbers in the whole unpadded tensor.
        cu_seqlens: (B + 1,), of the parts."""
        bounds = cu_seqlens.tolist()
        found = [
            self.positions(rank, end - start, cu_seqlens.device) + start * self.size
            for start, end in zip(bounds, bounds[1:])
        ]
        return torch.cat(found) if found else cu_seqlens.new_zeros(0, dtype=torch.int64)

    def restoring(self, part: int, cu_seqlens: torch.Tensor | None = None, device=None) -> torch.Tensor:
        """(size * part,): for each position, its row in the concatenated parts of all processes."""
        placed = [
            self.positions(rank, part, device) if cu_seqlens is None else self.unpadded_rows(rank, cu_seqlens)
            for rank in range(self.size)
        ]
        return torch.cat(placed).argsort()
