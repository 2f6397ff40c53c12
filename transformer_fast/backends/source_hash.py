"""What the native library is built from, as one number: setup.py compiles it in, native.py compares. No imports of the
package here, setup.py runs this file by its path."""

import hashlib
import pathlib

__all__ = ["source_hash"]


def source_hash(root: pathlib.Path) -> str:
    """Of every file under root/csrc and of root/setup.py, where the compilers' options are."""
    digest = hashlib.sha256()
    for path in [*sorted(p for p in (root / "csrc").rglob("*") if p.is_file()), root / "setup.py"]:
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]
