"""What a user looks at before work begins: the installation, a model on its weights, the prompt that it reads."""
