"""Finding an image, opening it within limits, and resizing it for the model's processor."""
