"""A hash of the sources of the native library. setup.py compiles it in, and native.py compares it with the sources.

This file imports nothing from the package, because setup.py runs it by its path.
"""

import hashlib
import pathlib

__all__ = ["source_hash"]


def source_hash(root: pathlib.Path) -> str:
    """The hash of every file under root/csrc and of root/setup.py, which sets the compiler options."""
    digest = hashlib.sha256()
    for path in [*sorted(p for p in (root / "csrc").rglob("*") if p.is_file()), root / "setup.py"]:
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]
