"""The version, which files on disk state too."""

__version__ = "0.1.0"
