"""python -m transformer_fast: the command line, also where `transformer-fast` is not on PATH."""

from .cli import main

main()
