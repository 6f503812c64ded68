"""Part of the stand-in for VLM2Vec v1."""
