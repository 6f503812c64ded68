"""From an input to the features of the model: opened, counted, cut, rendered and tokenized."""
