"""Gen2Embed as an encoder of mteb, and the records of the models that mteb lists."""
