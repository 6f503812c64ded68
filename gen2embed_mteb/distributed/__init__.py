"""Shards computed by the workers of a Ray cluster; Ray is imported only when it is asked for."""
