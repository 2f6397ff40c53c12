"""Additions of our pipelines to transformers' base: batches of similar lengths, progress bars, empty lists."""

from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm

__all__ = ["ListInputs"]


def _length(item: Any) -> int | None:
    """The length of an input, for sorting; None for inputs that are not text."""
    if isinstance(item, str):
        return len(item)
    if isinstance(item, dict) and "role" not in item and item:
        lengths = [_length(v) for v in item.values()]
        return None if None in lengths else sum(lengths)  # type: ignore[arg-type]
    return None


class ListInputs:
    """First base of a pipeline. A list is computed in batches of similar lengths; outputs are in the order of the list.
    progress=True, at construction or in a call, shows a bar.

    list_batch_size: the default batch size for lists; None: transformers' default (1).
    """

    list_batch_size: int | None = None
    _bar: Any = None

    def __init__(self, *args, progress: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.progress = progress

    def __call__(self, inputs, *args, batch_size: int | None = None, progress: bool | None = None, **kwargs):
        progress = self.progress if progress is None else progress
        if not isinstance(inputs, list):
            if batch_size is not None:
                kwargs["batch_size"] = batch_size
            outputs = super().__call__(inputs, *args, **kwargs)  # type: ignore[misc]
            streams = progress and isinstance(outputs, Iterable) and hasattr(outputs, "__next__")
            return tqdm(outputs, desc=self._title(), total=_total(inputs)) if streams else outputs
        if not inputs:
            return []
        size = batch_size or self._list_batch()
        order = self._order(inputs, kwargs) if size > 1 else None
        with tqdm(total=len(inputs), desc=self._title(), disable=not progress) as self._bar:
            try:
                ordered = inputs if order is None else [inputs[i] for i in order]
                outputs = super().__call__(ordered, *args, batch_size=size, **kwargs)  # type: ignore[misc]
            finally:
                self._bar = None
        if order is None or not isinstance(outputs, list) or len(outputs) != len(inputs):
            return outputs
        restored = [None] * len(inputs)
        for place, output in zip(order, outputs):
            restored[place] = output
        return restored

    def postprocess(self, *args, **kwargs):
        output = super().postprocess(*args, **kwargs)  # type: ignore[misc]
        self._advance()
        return output

    def _advance(self) -> None:
        """Advance the bar: one input of a list is done."""
        if self._bar is not None:
            self._bar.update()

    def _title(self) -> str:
        return getattr(self, "task", "") or type(self).__name__

    def _list_batch(self) -> int:
        if self._batch_size is not None:  # type: ignore[attr-defined]
            return self._batch_size  # type: ignore[attr-defined]
        tokenizer = getattr(self, "tokenizer", None)
        # Padding on the left shifts the positions of the tokens after it.
        padded = tokenizer is not None and tokenizer.pad_token_id is not None and tokenizer.padding_side != "left"
        return (self.list_batch_size if padded else None) or 1

    def _order(self, inputs: list, kwargs: dict) -> list[int] | None:
        """Indices with the longest input first, so that a lack of memory shows at once; None to keep the order."""
        lengths = [_length(item) for item in inputs]
        if None in lengths:
            return None
        return sorted(range(len(inputs)), key=lambda i: -lengths[i])  # type: ignore[operator]


def _total(inputs) -> int | None:
    return len(inputs) if hasattr(inputs, "__len__") else None
