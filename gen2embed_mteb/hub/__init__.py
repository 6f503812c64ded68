"""The Hugging Face hub: files read by `hf://` addresses, and planned files sent as one commit and read back."""
