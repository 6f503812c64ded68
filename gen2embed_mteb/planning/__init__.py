"""What a run will cost, computed before it starts: items, tokens, FLOP, bytes and hours."""
