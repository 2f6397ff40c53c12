"""The command line, `transformer-fast` or `python -m transformer_fast`: info, explain, verify, demo, bench."""

import sys

from ._version import __version__


def main() -> None:
    """Entry point. Exit codes: 0 success, 1 not the same (verify), 2 wrong usage or something is missing."""
    if sys.argv[1:] == ["--version"]:  # handled here, as it needs no other package
        print(f"transformer-fast {__version__}")
        return
    try:
        from .commands import app
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("typer", "rich"):
            raise
        print(f"transformer-fast needs {package}, which is not installed: pip install typer rich", file=sys.stderr)
        sys.exit(2)
    app()


if __name__ == "__main__":
    main()
