"""The version, which is also recorded in files on disk."""

__version__ = "0.1.0"
