"""Models: HF's classes with this package's computation, one module per family (registry.py lists them).

The package itself exports the names that users import. Nothing here loads transformers before one of them is used.
"""
