import importlib.metadata
import sys

__version__ = "0.2.0"
# The requirement from pyproject.toml, for messages that say what to install.
TRANSFORMERS = "transformers>=5.17,<5.25"


def old_transformers() -> str:
    """A sentence if transformers is installed and older than TRANSFORMERS, else ''. transformers is not imported."""
    loaded = sys.modules.get("transformers")
    try:
        found = getattr(loaded, "__version__", None) or importlib.metadata.version("transformers")
        release = tuple(int(part) for part in found.split(".")[:2])
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return ""
    if release >= (5, 17):
        return ""
    return f"transformer_fast needs {TRANSFORMERS}, and {found} is installed: pip install --upgrade '{TRANSFORMERS}'"
