"""Allocates the outputs of the ops, so that tests can poison all of them and large outputs get large pages."""

import ctypes
import math
import mmap
import os
import sys
import threading

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from .contents import FileMappings, unwritten

_poison = os.environ.get("TRANSFORMER_FAST_POISON") == "1"

# From this size on, page faults in fresh memory cost more than the writes. With 2 MB pages one fault covers 512 times
# as much. The tensor stays an ordinary one, and nothing changes where the operating system ignores the advice.
_LARGE = 2 << 20
_PAGE = 2 << 20
_CPU = torch.device("cpu")
_MADV_DONTNEED = 4
_MADV_HUGEPAGE = 14
_MREMAP_MAYMOVE, _MREMAP_DONTUNMAP = 1, 4
_MAP_FAILED = ctypes.c_void_p(-1).value
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
_madvise, _mremap, _munmap = (getattr(_libc, name, None) for name in ("madvise", "mremap", "munmap"))
if _madvise is not None:
    _madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
if _mremap is not None and _munmap is not None:
    _mremap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
    _mremap.restype = ctypes.c_void_p
    _munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


def unit_stride(t: torch.Tensor) -> torch.Tensor:
    """t with unit stride along its last axis, or a single element there; copied if necessary."""
    # Not contiguous(): an empty tensor counts as contiguous with any strides.
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.clone(memory_format=torch.contiguous_format)


def unit_stride_weight(weight: torch.Tensor) -> torch.Tensor:
    """A weight (out, in) with unit stride along its rows; copied if necessary. This holds for rows of one element too:
    the kernels take a weight with any other stride there for a transposed one."""
    return weight if weight.stride(-1) == 1 else weight.clone(memory_format=torch.contiguous_format)


def empty_like(t: torch.Tensor) -> torch.Tensor:
    """Uninitialised contiguous output with t's shape, dtype and device; poisoned as by `empty`."""
    if _poison or not t.is_contiguous():
        return empty(t.shape, t.dtype, t.device)
    out = torch.empty_like(t)
    if out.nbytes >= _LARGE and out.device.type == "cpu":
        _use_large_pages(out)
    return out


def empty(shape, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uninitialised output; filled with NaN when TRANSFORMER_FAST_POISON=1 (tests)."""
    out = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu" and out.nbytes >= _LARGE:
        _use_large_pages(out)
    if _poison and out.is_floating_point():
        out.fill_(float("nan"))
    return out


def empty_strided(shape, strides, dtype: torch.dtype, device: torch.device = _CPU) -> torch.Tensor:
    """Uninitialised dense output with these strides; poisoned as by `empty`."""
    out = torch.empty_strided(shape, strides, dtype=dtype, device=device)
    if device.type == "cpu" and out.nbytes >= _LARGE:
        _use_large_pages(out)
    if _poison and out.is_floating_point():
        out.fill_(float("nan"))
    return out


_keeps: bool | None = None  # whether freed memory stays with the process; None: not decided yet


def keep_freed() -> bool:
    """Let memory that is freed stay with the process, for all code in it, as far as malloc can: blocks up to 32 MB.

    A training step frees nearly all it allocates. glibc hands most of that back to the system, and the next step pays
    for fresh pages again: a tenth of a step of BERT. The process then keeps the most that it ever needed at once. Does
    nothing with another libc, or if the environment sets TRANSFORMER_FAST_KEEP_MEMORY=0 or glibc's own MALLOC_
    variables. Returns whether memory is kept.
    """
    global _keeps
    if _keeps is None:
        set_already = "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ)
        wanted = os.environ.get("TRANSFORMER_FAST_KEEP_MEMORY", "1") != "0" and not set_already
        _keeps = wanted and hasattr(_libc, "gnu_get_libc_version") and hasattr(_libc, "mallopt")
        # Setting the one fixes the other at 128 KB, unless it is set too. 32 MB is the most that glibc takes.
        _keeps = _keeps and bool(_libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20) and _libc.mallopt(_M_TRIM_THRESHOLD, -1))  # type: ignore[union-attr]
    return _keeps


def keep_for_training(x: torch.Tensor) -> None:
    """keep_freed, if x is on the CPU and gradients are computed. A compiler need not see this."""
    if torch.is_grad_enabled() and x.device.type == "cpu" and not torch.compiler.is_compiling():
        keep_freed()


_LARGEST = 32 << 20  # what malloc can keep
_gradients = WeakTensorKeyDictionary()  # weight -> the storages of its last gradients
_gradients_lock = threading.Lock()


def empty_gradient(weight: torch.Tensor | None, shape, dtype: torch.dtype) -> torch.Tensor:
    """Uninitialised memory on the CPU for a gradient of a weight, the same in every training step once nobody else
    refers to it. For weights over 32 MB, such as the embeddings of a large vocabulary: keep_freed does not reach them.
    weight: None if it is gone."""
    size = dtype.itemsize * math.prod(shape)
    if weight is None or size <= _LARGEST or not _keeps or type(weight) not in (torch.Tensor, torch.nn.Parameter):
        return empty(shape, dtype, torch.device("cpu"))
    with _gradients_lock:
        storages = _gradients.setdefault(weight, [])
        for storage in storages:
            if storage.nbytes() == size and torch._C._storage_Use_Count(storage._cdata) == 1:
                out = torch.empty(0, dtype=dtype).set_(storage, 0, tuple(shape))  # type: ignore[call-overload]
                return out.fill_(float("nan")) if _poison else out
        out = empty(shape, dtype, torch.device("cpu"))
        storages.append(out.untyped_storage())
        del storages[:-2]  # a tied weight has two gradients at a time
        return out


class Kept:
    """CPU memory that stays with the process between the calls that need it: the system takes longer to hand out fresh
    pages than a call to write to them.

    most: bytes to keep while nobody uses them. What has been unused for longest goes first.
    """

    def __init__(self, most: int = 64 << 20):
        self.most = most
        self._blocks: list[torch.Tensor] = []
        self._lock = threading.Lock()

    def take(self, size: int) -> torch.Tensor:
        """Uninitialised uint8 memory of at least `size` bytes, until it is given back."""
        with self._lock:
            fits = [i for i, block in enumerate(self._blocks) if size <= block.nbytes <= 2 * size]
            if fits:
                return self._blocks.pop(fits[-1])
        return empty((size,), torch.uint8, torch.device("cpu"))

    def give(self, block: torch.Tensor) -> None:
        with self._lock:
            self._blocks.append(block)
            while sum(b.nbytes for b in self._blocks) > self.most:
                del self._blocks[0]


class Loan:
    """Tensors in memory of a Kept. Their memory goes back to it with the loan: nobody may read them after that."""

    def __init__(self, kept: Kept):
        self._kept = kept
        self._blocks: dict[int, torch.Tensor] = {}

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """As empty, on the CPU."""
        size = dtype.itemsize * math.prod(shape)
        block = self._kept.take(max(size, 1))
        self._blocks[block.data_ptr()] = block
        out = block[:size].view(dtype).view(shape)
        if _poison and out.is_floating_point():
            out.fill_(float("nan"))
        return out

    def give(self, t: torch.Tensor) -> None:
        """Give back the memory of t, made by empty."""
        self._kept.give(self._blocks.pop(t.data_ptr()))

    def __del__(self):
        for block in self._blocks.values():
            self._kept.give(block)


def _use_large_pages(out: torch.Tensor) -> None:
    """Ask for large pages for the 2 MB pages that lie entirely inside a fresh tensor."""
    if type(out) is torch.Tensor:
        _advise(out, _PAGE, _MADV_HUGEPAGE)


def _pages(t: torch.Tensor, size: int) -> range:
    """The numbers of the pages of `size` bytes that lie entirely inside t."""
    return range(-(-t.data_ptr() // size), (t.data_ptr() + t.nbytes) // size)


def _advise(t: torch.Tensor, size: int, advice: int) -> None:
    pages = _pages(t, size)
    if _madvise is not None and pages:
        _madvise(pages[0] * size, len(pages) * size, advice)


def unload(t: torch.Tensor, mappings: FileMappings) -> None:
    """Release the pages that lie entirely inside t, if they are unwritten pages of a mapped file. The next read loads
    them from the file again.

    The pages are moved away, not dropped: if another thread has written to one since the check, the write is found in
    the moved page and put back. Does nothing for other memory, or where the system does not support this.
    """
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
    """Copy back to `begin` what another thread wrote to the pages before they were moved to `moved`, where it has not
    written since."""
    if _madvise is None or unwritten([_bytes(moved, size)])[0]:
        return
    for at in range(0, size, mmap.PAGESIZE):
        page = _bytes(moved + at, mmap.PAGESIZE)
        if not unwritten([page])[0]:
            written = page.clone()
            _madvise(moved + at, mmap.PAGESIZE, _MADV_DONTNEED)  # the file's content again
            here = _bytes(begin + at, mmap.PAGESIZE)
            changed = (written != page) & (here == page)
            here[changed] = written[changed]


def _bytes(address: int, size: int) -> torch.Tensor:
    return torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)
