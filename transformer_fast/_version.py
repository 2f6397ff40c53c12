__version__ = "0.2.0"
# As pyproject.toml has it: what messages tell people to install.
TRANSFORMERS = "transformers>=5.17,<5.25"
