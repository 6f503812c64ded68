"""Real weights and real texts that packages carry, for benchmarks without a model hub."""
