"""What the model is, and how an input becomes a vector."""
