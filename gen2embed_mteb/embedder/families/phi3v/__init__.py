"""Phi-3.5-V: a model and a processor made of parts of transformers, which has no class for it."""
