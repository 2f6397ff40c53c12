"""Output memory of the ops: one place to allocate, so that tests can poison it and large outputs get large pages."""

import ctypes
import mmap
import os
import sys

import torch

from .contents import FileMappings, unwritten

_poison = os.environ.get("TRANSFORMER_FAST_POISON") == "1"

# From here on fresh memory costs more in page faults than in being written. With 2 MB pages a fault covers 512
# times as much; the tensor stays an ordinary one, and where the kernel declines nothing changes.
_LARGE = 2 << 20
_PAGE = 2 << 20
_MADV_DONTNEED = 4
_MADV_HUGEPAGE = 14
_MREMAP_MAYMOVE, _MREMAP_DONTUNMAP = 1, 4
_MAP_FAILED = ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
_madvise, _mremap, _munmap = (getattr(_libc, name, None) for name in ("madvise", "mremap", "munmap"))
if _madvise is not None:
    _madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
if _mremap is not None and _munmap is not None:
    _mremap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
    _mremap.restype = ctypes.c_void_p
    _munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


def empty_like(t: torch.Tensor) -> torch.Tensor:
    """Uninitialised contiguous output of t's shape, dtype and device; poisoned as in empty."""
    if _poison or not t.is_contiguous():
        return empty(t.shape, t.dtype, t.device)
    return torch.empty_like(t)


def empty(shape, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uninitialised output; filled with NaN when TRANSFORMER_FAST_POISON=1 (tests)."""
    out = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu" and out.nbytes >= _LARGE:
        _use_large_pages(out)
    if _poison and out.is_floating_point():
        out.fill_(float("nan"))
    return out


def empty_strided(shape, strides, dtype: torch.dtype) -> torch.Tensor:
    """Uninitialised dense output on the CPU, as empty."""
    out = torch.empty_strided(shape, strides, dtype=dtype)
    if out.nbytes >= _LARGE:
        _use_large_pages(out)
    if _poison:
        out.fill_(float("nan"))
    return out


def _use_large_pages(out: torch.Tensor) -> None:
    """Ask for large pages in the whole 2 MB pages inside a fresh tensor, and nowhere else."""
    if type(out) is torch.Tensor:
        _advise(out, _PAGE, _MADV_HUGEPAGE)


def _pages(t: torch.Tensor, size: int) -> range:
    """The numbers of the pages of `size` bytes that lie whole inside t."""
    return range(-(-t.data_ptr() // size), (t.data_ptr() + t.nbytes) // size)


def _advise(t: torch.Tensor, size: int, advice: int) -> None:
    pages = _pages(t, size)
    if _madvise is not None and pages:
        _madvise(pages[0] * size, len(pages) * size, advice)


def unload(t: torch.Tensor, mappings: FileMappings) -> None:
    """Give back the pages that lie whole inside t where they are a file's, unwritten: the next read brings them back.

    The pages are moved away rather than dropped: what another thread wrote to one since it was asked about is found
    there, and put back. Nothing happens to other memory, or where the system cannot do this."""
    pages = _pages(t, mmap.PAGESIZE)
    if _mremap is None or _munmap is None or not pages or mappings.find(t) is None:
        return
    begin, size = pages[0] * mmap.PAGESIZE, len(pages) * mmap.PAGESIZE
    if not unwritten([_bytes(begin, size)])[0]:
        return
    moved = _mremap(begin, size, size, _MREMAP_MAYMOVE | _MREMAP_DONTUNMAP, None)
    if moved in (None, _MAP_FAILED):
        return
    _put_back(begin, moved, size)
    _munmap(moved, size)


def _put_back(begin: int, moved: int, size: int) -> None:
    """What was written to the pages at `moved` when they were taken from `begin`."""
    if _madvise is None or unwritten([_bytes(moved, size)])[0]:
        return
    for at in range(0, size, mmap.PAGESIZE):
        page = _bytes(moved + at, mmap.PAGESIZE)
        if not unwritten([page])[0]:
            written = page.clone()
            _madvise(moved + at, mmap.PAGESIZE, _MADV_DONTNEED)  # the file's own again
            changed = written != page
            _bytes(begin + at, mmap.PAGESIZE)[changed] = written[changed]


def _bytes(address: int, size: int) -> torch.Tensor:
    return torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)
