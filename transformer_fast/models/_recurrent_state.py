"""The cache of a recurrent decoder."""

import torch

__all__ = ["RecurrentState"]


class RecurrentState:
    """The decoder's state between two steps. It has the place of a cache, and does not grow with the output.

    hidden, cell: (num_layers, B, hidden_size); feed: (B, hidden_size), the last readout (Luong); keys: (B, Sk, width),
    the encoder's states, projected once.
    """

    is_compileable = False

    def __init__(self, hidden: torch.Tensor, cell: torch.Tensor | None, keys: torch.Tensor, feed: torch.Tensor | None):
        self.hidden, self.cell, self.keys, self.feed = hidden, cell, keys, feed
        self.length = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorder the beams of each sentence. The keys are not moved: all beams of a sentence have the same."""
        index = beam_idx.to(self.hidden.device)
        self.hidden = self.hidden.index_select(1, index)
        self.cell = None if self.cell is None else self.cell.index_select(1, index)
        self.feed = None if self.feed is None else self.feed.index_select(0, index)

    def select(self, index: torch.Tensor) -> None:
        """Row r becomes row index[r], also of another sentence."""
        self.reorder_cache(index)
        self.keys = self.keys.index_select(0, index)
