"""The one word: which tokens the output layer would write at the position of the embedding."""
