"""How a table of somebody else's is read: every row passes one guard, every shard is accounted for."""
