"""Whether tensors still hold what they held when something was made of them, whoever wrote to them and however.

Neither torch's version counters nor hooks see every writer (fused optimizers, `.data`, numpy, other libraries), so the
memory itself is asked. A page of a privately mapped file, such as a checkpoint's, becomes one of the process's own
(anonymous) with the first write to it, which /proc/self/pagemap tells; so tensors that lie in such a file, unwritten,
are known from their pages, a microsecond for every megabyte or less. All others are hashed, all of their bytes, at the
rate at which memory is read.
"""

import mmap
import os
import time
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import torch

__all__ = ["Contents", "FileMappings", "mirror_files", "unwritten"]

_RESIDENT_OR_SWAPPED, _OF_A_FILE = -1 << 62, 1 << 61  # the upper bits of an entry of /proc/self/pagemap
# Nanoseconds: a file that was written so shortly before may be again without a change of its time, where file systems
# keep whole seconds; where they keep less, a fortieth.
_STILL = 2 * 10**9


class _File(NamedTuple):
    """Where memory lies in a file: device and inode, the offset there, and the file's state."""

    file: tuple[str, int]
    offset: int
    state: tuple[int, int, int] | None  # time of the last writing and of the last change in ns, bytes; None: unknown


class FileMappings:
    """The files that are mapped privately now (a snapshot: make one, use it, drop it)."""

    def __init__(self) -> None:
        self._begins: list[int] = []
        self._ends: list[int] = []
        self._offsets: list[int] = []
        self._files: list[tuple[str, int]] = []
        self._paths: list[str] = []
        self._states: dict[str, tuple[int, int, int] | None] = {}
        try:
            with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
                lines = file.read().splitlines()
        except OSError:
            return
        for line in lines:
            about = line.split(None, 5)
            if len(about) < 6 or about[4] == "0" or about[1][3] != "p":
                continue
            begin, end = (int(x, 16) for x in about[0].split("-"))
            offset, file_of = int(about[2], 16), (about[3], int(about[4]))
            if self._ends and (self._ends[-1], self._files[-1]) == (begin, file_of):
                goes_on = self._offsets[-1] + begin - self._begins[-1] == offset
            else:
                goes_on = False
            if goes_on:  # one mapping that somebody has split
                self._ends[-1] = end
                continue
            self._begins.append(begin)
            self._ends.append(end)
            self._offsets.append(offset)
            self._files.append(file_of)
            self._paths.append(about[5])

    def find(self, t: torch.Tensor) -> _File | None:
        """Where t lies, if it is dense and lies in a file."""
        if t.device.type != "cpu" or not is_dense(t) or not t.nbytes:
            return None
        begin = t.data_ptr()
        i = bisect_right(self._begins, begin) - 1
        if i < 0 or begin + t.nbytes > self._ends[i]:
            return None
        return _File(self._files[i], self._offsets[i] + begin - self._begins[i], self._state(i))

    def _state(self, index: int) -> tuple[int, int, int] | None:
        path = self._paths[index]
        if path not in self._states:
            self._states[path] = None
            try:
                found = os.stat(path)
            except OSError:  # deleted, or out of sight
                return None
            if found.st_ino == self._files[index][1]:
                self._states[path] = (found.st_mtime_ns, found.st_ctime_ns, found.st_size)
        return self._states[path]


def is_dense(t: torch.Tensor) -> bool:
    """True when t takes a stretch of memory without gaps or overlaps, in whatever order."""
    if t.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(t.stride(), t.shape)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _pages(t: torch.Tensor) -> range:
    """The numbers of the pages that t has a part of."""
    return range(t.data_ptr() // mmap.PAGESIZE, -(-(t.data_ptr() + t.nbytes) // mmap.PAGESIZE))


def unwritten(tensors: Sequence[torch.Tensor]) -> list[bool]:
    """For each tensor, which lies in a private mapping of a file: True when no page it has a part of was written to.
    False where the system does not say."""
    if not tensors:
        return []
    pages = [_pages(t) for t in tensors]
    runs: list[tuple[int, int]] = []
    for page in sorted(pages, key=lambda p: p[0]):
        if runs and page[0] <= runs[-1][1]:
            runs[-1] = (runs[-1][0], max(runs[-1][1], page[-1] + 1))
        else:
            runs.append((page[0], page[-1] + 1))
    clean: dict[int, torch.Tensor] = {}
    try:
        descriptor = os.open("/proc/self/pagemap", os.O_RDONLY)
    except OSError:
        return [False] * len(tensors)
    try:
        for first, end in runs:
            entries = bytearray(8 * (end - first))
            if os.preadv(descriptor, [entries], 8 * first) != len(entries):
                return [False] * len(tensors)
            # In pieces that torch does not share out: waking a thread takes longer than all of them.
            pieces = torch.frombuffer(entries, dtype=torch.int64).split(1 << 14)
            clean[first] = torch.cat([(p & _OF_A_FILE != 0) | (p & _RESIDENT_OR_SWAPPED == 0) for p in pieces])
    except OSError:
        return [False] * len(tensors)
    finally:
        os.close(descriptor)
    if all(bool(piece.all()) for part in clean.values() for piece in part.split(1 << 14)):
        return [True] * len(tensors)
    begins = [first for first, _ in runs]
    found = []
    for p in pages:
        first = begins[bisect_right(begins, p[0]) - 1]
        found.append(bool(clean[first][p[0] - first : p[-1] + 1 - first].all()))
    return found


def _hashes(tensors: Sequence[torch.Tensor]) -> list[int]:
    dense = [t if is_dense(t) else t.contiguous() for t in tensors]
    found = torch.empty(len(dense), dtype=torch.int64)
    torch.ops.transformer_fast.cpu_content_hash.default(dense, found)
    return found.tolist()


class _Noted(NamedTuple):
    layout: tuple
    hash: int
    file: _File | None  # where its bytes are those of a file, unwritten


class Contents:
    """What CPU tensors held when a copy was made of them.

    note(t) before t is read for the copy; then same(tensors), of as many tensors in the same order, says whether a copy
    made of them now would be the same. Exact but for two contents with one 64-bit hash. A write that runs while a copy
    is made, or while it is asked about, is seen by the next question at the latest.

    Where the tensors lie does not matter, nor which tensors they are. Wants the native library.
    """

    def __init__(self) -> None:
        self._noted: list[_Noted] = []

    def note(self, tensors: Sequence[torch.Tensor], mappings: FileMappings) -> None:
        """mappings: of now."""
        tensors = [t.detach() for t in tensors]
        files = [mappings.find(t) for t in tensors]
        # Hashed first: what is unwritten afterwards was the file's when it was read.
        hashes = _hashes(tensors)
        for t, h, file in zip(tensors, hashes, _unwritten_files(tensors, files)):
            self._noted.append(_Noted(_layout(t), h, _settled(file)))

    def same(self, tensors: Sequence[torch.Tensor]) -> bool:
        tensors = [t.detach() for t in tensors]
        if len(tensors) != len(self._noted):
            return False
        if any(_layout(t) != noted.layout for t, noted in zip(tensors, self._noted)):
            return False
        mappings = FileMappings()
        files = _unwritten_files(tensors, [mappings.find(t) for t in tensors])
        unsure = [i for i, file in enumerate(files) if file is None or file != self._noted[i].file]
        hashes = _hashes([tensors[i] for i in unsure]) if unsure else []
        if any(self._noted[i].hash != h for i, h in zip(unsure, hashes)):
            return False
        for i in unsure:  # another file, or one that was written again: its pages tell from now on
            self._noted[i] = self._noted[i]._replace(file=_settled(files[i]))
        return True


def mirror_files(tensors: Sequence[torch.Tensor]) -> bool:
    """True when all of the tensors lie in privately mapped files, such as a checkpoint's, and none has been written to
    since: copies of them are all the memory that is needed."""
    mappings = FileMappings()
    return all(mappings.find(t) is not None for t in tensors) and all(unwritten(tensors))


def _unwritten_files(tensors: Sequence[torch.Tensor], files: Sequence[_File | None]) -> list[_File | None]:
    """files, None for tensors that were written to."""
    inside = [i for i, file in enumerate(files) if file is not None]
    clean = dict(zip(inside, unwritten([tensors[i] for i in inside])))
    return [file if clean.get(i) else None for i, file in enumerate(files)]


def _settled(file: _File | None) -> _File | None:
    """file where a later writing of it would show in its state."""
    if file is None or file.state is None:
        return None
    last = max(file.state[:2])
    still = _STILL if last % 10**9 == 0 else _STILL // 40
    return None if last > time.time_ns() - still else file


def _layout(t: torch.Tensor) -> tuple:
    return t.shape, t.stride(), t.dtype, t.device
