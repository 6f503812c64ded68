"""The contrastive loss in sub-batches, and what it computes only once."""
