"""What runs inside VLM2Vec's scripts: the model, and the methods and modules that it stands in for."""
