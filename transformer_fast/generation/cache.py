"""A key-value cache that is written in place, with Hugging Face's Cache interface."""

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

__all__ = ["StepCache", "shared_cross_cache"]

_SLACK = 256  # positions allocated beyond the prompt if the maximum length is far larger than the prompt


class StepCache(Cache):
    """Keys and values of all layers in one tensor (layers, 2, rows, H, capacity, D).

    Those of the prompts are first stored per layer, (B, H, S, D). `open` then copies them to the `copies` rows of each
    prompt, and further positions are written in place, without concatenation.
    """

    def __init__(self):
        super().__init__(layers=[])
        self.length = 0  # positions in use, in every layer
        self.prompt_length = 0
        self._prompts: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._store: torch.Tensor | None = None
        self._views: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._rows = 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        if self._store is None:
            self._prompts.append((key_states, value_states))
            return key_states, value_states
        keys, values = self._views[layer_idx]
        start, end = self.length, self.length + key_states.shape[2]
        keys[:, :, start:end].copy_(key_states)
        values[:, :, start:end].copy_(value_states)
        return keys[:, :, :end], values[:, :, :end]

    def open(self, copies: int, max_length: int) -> None:
        """Allocate `copies` rows per prompt, with room for at most max_length positions, and fill in the prompts."""
        key, _ = self._prompts[0]
        batch, heads, length, dim = key.shape
        most = max(max_length, length + 1)
        capacity = most if most <= length + 4 * _SLACK else length + _SLACK
        self._rows = batch * copies
        shape = (len(self._prompts), 2, self._rows, heads, capacity, dim)
        self._store = key.new_empty(shape)
        by_prompt = self._store.unflatten(2, (batch, copies))
        for index, pair in enumerate(self._prompts):
            for kind, states in enumerate(pair):
                by_prompt[index, kind, :, :, :, :length] = states[:, None]
        self._prompts.clear()
        self.length = self.prompt_length = length
        self._look()

    def _look(self) -> None:
        assert self._store is not None
        self._views = [(pair[0], pair[1]) for pair in self._store[:, :, : self._rows]]

    def advance(self) -> None:
        """Count the position that all layers have written, and make room for the next."""
        self.length += 1
        assert self._store is not None
        if self.length == self._store.shape[4]:
            grown = self._store.new_empty((*self._store.shape[:4], 2 * self.length, self._store.shape[5]))
            grown[:, :, :, :, : self.length] = self._store
            self._store = grown
            self._look()

    def reorder(self, index: torch.Tensor) -> None:
        """Row r becomes row index[r] of the same prompt. Only generated positions of rows that change are copied."""
        assert self._store is not None
        part = self._store[:, :, : self._rows, :, self.prompt_length : self.length]
        if part.device.type == "cpu":  # on a GPU reading index would synchronise
            moved = (index != torch.arange(self._rows)).nonzero().squeeze(1)
            if len(moved):
                part[:, :, moved] = part[:, :, index[moved]]
        else:
            part.copy_(part.index_select(2, index))

    def keep(self, index: torch.Tensor) -> None:
        assert self._store is not None
        self._rows = len(index)
        part = self._store[:, :, :, :, : self.length]
        moved = (index != torch.arange(self._rows, device=index.device)).nonzero().squeeze(1)
        if len(moved):
            part[:, :, moved] = part[:, :, index[moved]]
        self._look()

    def pairs(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(k[:, :, : self.length], v[:, :, : self.length]) for k, v in self._views]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.length + query_length, 0

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_sliding(self) -> list[bool]:
        return [False]

    def __len__(self) -> int:
        return len(self._views)


def shared_cross_cache(cache: EncoderDecoderCache, index: torch.Tensor) -> None:
    """Keep only the cross-attention keys and values of the prompts (or rows) `index`, in that order."""
    for layer in cache.cross_attention_cache.layers:
        layer.keys, layer.values = layer.keys.index_select(0, index), layer.values.index_select(0, index)


def as_hugging_face(pairs: list[tuple[torch.Tensor, torch.Tensor]], encoder_decoder: bool) -> Any:
    """A DynamicCache of these keys and values. For an encoder-decoder it has an empty cross-attention cache, which a
    model fills again."""
    cache = DynamicCache()
    for index, (key, value) in enumerate(pairs):
        cache.update(key, value, index)
    return EncoderDecoderCache(cache, DynamicCache()) if encoder_decoder else cache
