"""The cache of a recurrent decoder."""

import torch

__all__ = ["RecurrentState"]


class RecurrentState:
    """What the decoder carries from step to step: a cache of one position, however long the output.

    hidden, cell: (num_layers, B, hidden_size); feed: (B, hidden_size), Luong's last readout; keys: (B, Sk, width), the
    encoder's states as the score reads them, projected once.
    """

    is_compileable = False

    def __init__(self, hidden: torch.Tensor, cell: torch.Tensor | None, keys: torch.Tensor, feed: torch.Tensor | None):
        self.hidden, self.cell, self.keys, self.feed = hidden, cell, keys, feed
        self.length = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Beams change places within their sentence, where the keys are the same."""
        index = beam_idx.to(self.hidden.device)
        self.hidden = self.hidden.index_select(1, index)
        self.cell = None if self.cell is None else self.cell.index_select(1, index)
        self.feed = None if self.feed is None else self.feed.index_select(0, index)

    def select(self, index: torch.Tensor) -> None:
        """Row r becomes row index[r], whatever its sentence."""
        self.reorder_cache(index)
        self.keys = self.keys.index_select(0, index)
