"""How a picture is found, opened within limits, and brought to the size that the processor gets."""
