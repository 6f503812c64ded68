"""The generator, kept: the embedder's own weights with the output layer, which writes texts and judges pairs."""
