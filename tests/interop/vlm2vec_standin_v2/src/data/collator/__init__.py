"""Part of the stand-in for VLM2Vec V2."""
