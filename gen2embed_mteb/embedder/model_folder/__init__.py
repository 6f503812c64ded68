"""A model's folder: its checks before any library reads it, loading, adapters, saving and reading back."""
