"""MMEB, MMEB-mini and SugarCrepe++ as tasks and benchmarks of mteb."""
