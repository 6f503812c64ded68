"""Self-aware hard negative sampling (SaHa): exact search, and the clusters of Algorithm 1 that are mined with it."""
