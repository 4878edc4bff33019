"""The version, for whatever writes it down. pyproject.toml has it too."""

__version__ = "0.1.0"
