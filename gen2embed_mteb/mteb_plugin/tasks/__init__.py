"""mteb's tasks and benchmarks: MMEB and SugarCrepe as mteb knows tasks."""
