__version__ = "0.2.0"
# The requirement from pyproject.toml, for messages that say what to install.
TRANSFORMERS = "transformers>=5.17,<5.25"
