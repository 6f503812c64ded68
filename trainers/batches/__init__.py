"""Turns sampling files into batches: the dataset, the sampler, and the model's features."""
