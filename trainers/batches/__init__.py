"""From sampling files to batches: the dataset, the sampler, and what the model is given."""
