"""A model's folder: checked before any library reads it, loaded, adapted, saved and read back."""
