"""How many inputs are encoded: batches by tokens, a pipeline, a store on disk, several processes. Knows no model."""
