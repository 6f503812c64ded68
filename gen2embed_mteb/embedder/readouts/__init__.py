"""Which hidden state of the decoder becomes the embedding."""
