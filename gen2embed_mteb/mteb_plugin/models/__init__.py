"""mteb's models: Gen2Embed as mteb's encoder, and the records of the models that it lists."""
