"""Progress of a run: tqdm's bar if it is installed, else one line per case."""

import importlib.util
import sys

__all__ = ["Progress"]


class Progress:
    """with Progress(total) as bar: bar.describe(name), bar.detail(text), bar.line(text), bar.update()."""

    def __init__(self, total: int):
        self._bar = None
        if importlib.util.find_spec("tqdm") is not None:
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit="case", disable=None)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.close()

    def describe(self, name: str) -> None:
        if self._bar is not None:
            self._bar.set_description(name)

    def detail(self, text: str) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=True)

    def line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, file=sys.stdout, flush=True)

    def update(self) -> None:
        if self._bar is not None:
            self._bar.update()
