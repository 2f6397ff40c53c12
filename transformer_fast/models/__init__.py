"""Models: HF's classes with this package's computation, one module a family (registry.py lists them).

The names users import are exported by the package itself; nothing here loads transformers before one is used.
"""
