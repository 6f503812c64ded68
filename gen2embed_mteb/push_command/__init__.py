"""`gen2embed push`: which files of a folder are sent to the hub, and the command that sends them."""
