"""Detects whether tensors have changed since something was derived from them, such as a packed copy of a weight.

Neither torch's version counters nor hooks see every write (fused optimizers, `.data`, numpy, other libraries), so this
module looks at the memory itself. The first write to a page of a privately mapped file, such as a checkpoint, turns the
page into anonymous memory, and /proc/self/pagemap shows that. Tensors in unwritten pages of a mapped file are therefore
checked by their pages, at a microsecond per megabyte or less. All other tensors are hashed in full, at the rate at
which memory is read.
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
# Nanoseconds. A file written more recently than this may be written again without a change of its time stamp, on a file
# system that stores whole seconds. Where it stores fractions of a second, a fortieth of this is enough.
_STILL = 2 * 10**9


class _File(NamedTuple):
    """The place of a tensor's memory in a mapped file: device and inode, offset, and the state of the file."""

    file: tuple[str, int]
    offset: int
    state: tuple[int, int, int] | None  # mtime and ctime in ns, size in bytes; None: unknown


class FileMappings:
    """A snapshot of the private file mappings of this process. It goes out of date: use it at once, then drop it."""

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
            if goes_on:  # parts of one mapping that was split
                self._ends[-1] = end
                continue
            self._begins.append(begin)
            self._ends.append(end)
            self._offsets.append(offset)
            self._files.append(file_of)
            self._paths.append(about[5])

    def find(self, t: torch.Tensor) -> _File | None:
        """The place of t in a mapped file; None if t is not dense or not in one."""
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
            except OSError:  # deleted, or not visible from here
                return None
            if found.st_ino == self._files[index][1]:
                self._states[path] = (found.st_mtime_ns, found.st_ctime_ns, found.st_size)
        return self._states[path]


def is_dense(t: torch.Tensor) -> bool:
    """True when the elements of t fill one range of memory without gaps or overlaps, in any order of dimensions."""
    if t.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(t.stride(), t.shape)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _pages(t: torch.Tensor) -> range:
    """The numbers of the pages that t overlaps."""
    return range(t.data_ptr() // mmap.PAGESIZE, -(-(t.data_ptr() + t.nbytes) // mmap.PAGESIZE))


def unwritten(tensors: Sequence[torch.Tensor]) -> list[bool]:
    """For each tensor in a private file mapping: True when none of the pages it overlaps was written to. False where
    the system does not tell."""
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
            # Split into pieces too small for torch to parallelise: waking a thread takes longer than the whole work.
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
    file: _File | None  # set when the tensor lies in unwritten pages of a mapped file


class Contents:
    """The contents of CPU tensors at the time a copy was made of them.

    Call note(tensors) before they are read for the copy. same(tensors), with as many tensors in the same order, then
    says whether a copy made now would be the same. The answer is exact, except for two contents with equal 64-bit
    hashes. A write that runs during note() or same() is detected by the next call of same() at the latest.

    Only contents and layouts are compared, not the identity or the address of the tensors. Needs the native library.
    """

    def __init__(self) -> None:
        self._noted: list[_Noted] = []

    def note(self, tensors: Sequence[torch.Tensor], mappings: FileMappings) -> None:
        """Record the contents of `tensors`. mappings: a snapshot taken just before."""
        tensors = [t.detach() for t in tensors]
        files = [mappings.find(t) for t in tensors]
        # Hash first: a page that is still unwritten afterwards held the file's bytes while it was hashed.
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
        for i in unsure:  # equal contents in another file or a rewritten one: the next check can use its pages
            self._noted[i] = self._noted[i]._replace(file=_settled(files[i]))
        return True


def mirror_files(tensors: Sequence[torch.Tensor]) -> bool:
    """True when all tensors lie in privately mapped files, such as a checkpoint, and none has been written to since.
    The system can then drop their pages and read them again, so a packed copy does not double the memory."""
    mappings = FileMappings()
    return all(mappings.find(t) is not None for t in tensors) and all(unwritten(tensors))


def _unwritten_files(tensors: Sequence[torch.Tensor], files: Sequence[_File | None]) -> list[_File | None]:
    """`files` with None for tensors that were written to."""
    inside = [i for i, file in enumerate(files) if file is not None]
    clean = dict(zip(inside, unwritten([tensors[i] for i in inside])))
    return [file if clean.get(i) else None for i, file in enumerate(files)]


def _settled(file: _File | None) -> _File | None:
    """`file` if any later write to the file would change its recorded state, else None."""
    if file is None or file.state is None:
        return None
    last = max(file.state[:2])
    still = _STILL if last % 10**9 == 0 else _STILL // 40
    return None if last > time.time_ns() - still else file


def _layout(t: torch.Tensor) -> tuple:
    return t.shape, t.stride(), t.dtype, t.device
