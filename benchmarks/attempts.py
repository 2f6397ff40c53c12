"""Records the current case of a run on disk, so that a case which hangs or crashes its process affects no other."""

import json
import os
import pathlib
import threading

__all__ = ["MOST", "Attempts"]

MOST = 2  # the first attempt may have been killed from outside, or have compiled for too long


class Attempts:
    """Call begin() before and end() after a case. After `limit` seconds in between, the process exits with `status`.
    None: no limit, and nothing is recorded."""

    def __init__(self, file: pathlib.Path, limit: float | None, status: int):
        self.file, self.limit, self.status = file, limit, status
        self.timer: threading.Timer | None = None
        try:
            self.begun: dict[str, int] = json.loads(file.read_text()) if limit else {}
        except (OSError, ValueError):
            self.begun = {}

    def given_up(self, case: str) -> bool:
        """Whether the case was begun MOST times and never ended."""
        return self.begun.get(case, 0) >= MOST

    def begin(self, case: str) -> None:
        if not self.limit:
            return
        self.begun[case] = self.begun.get(case, 0) + 1
        self._write()
        self.timer = threading.Timer(self.limit, os._exit, [self.status])
        self.timer.daemon = True
        self.timer.start()

    def end(self, case: str) -> None:
        if self.timer is not None:
            self.timer.cancel()
        if self.begun.pop(case, None) is not None:
            self._write()

    def _write(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.file.with_suffix(".new")
        fresh.write_text(json.dumps(self.begun))
        os.replace(fresh, self.file)
