"""python -m transformer_fast: the command line, also if `transformer-fast` is not on PATH."""

from .cli import main

main()
