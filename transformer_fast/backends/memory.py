"""Output memory of the ops: one place to allocate, so that tests can poison it and large outputs get large pages."""

import ctypes
import mmap
import os
import sys

import torch

_poison = os.environ.get("TRANSFORMER_FAST_POISON") == "1"

# From here on fresh memory costs more in page faults than in being written. With 2 MB pages a fault covers 512
# times as much; the tensor stays an ordinary one, and where the kernel declines nothing changes.
_LARGE = 2 << 20
_PAGE = 2 << 20
_MADV_DONTNEED = 4
_MADV_HUGEPAGE = 14
_madvise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
if _madvise is not None:
    _madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


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


_RESIDENT_OR_SWAPPED, _OF_A_FILE = -1 << 62, 1 << 61  # the upper bits of an entry of /proc/self/pagemap


def mirrors_file(t: torch.Tensor) -> bool:
    """True when every page inside t is that of a mapped file, such as a checkpoint's, and none has been written to
    since; False where t is smaller than a page or the system does not say."""
    if _madvise is None or t.device.type != "cpu" or not t.is_contiguous():
        return False
    pages = _pages(t, mmap.PAGESIZE)
    entries = bytearray(8 * len(pages))
    if not entries:
        return False
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            file.seek(8 * pages[0])
            if file.readinto(entries) != len(entries):
                return False
    except OSError:
        return False
    flags = torch.frombuffer(entries, dtype=torch.int64)
    return bool(((flags & _OF_A_FILE != 0) | (flags & _RESIDENT_OR_SWAPPED == 0)).all())


def unload(t: torch.Tensor) -> None:
    """Give back the pages of t where it mirrors a file: the next read brings them back. Elsewhere nothing happens."""
    if mirrors_file(t):
        _advise(t, mmap.PAGESIZE, _MADV_DONTNEED)
