"""The model, and the way from one input to its vector."""
