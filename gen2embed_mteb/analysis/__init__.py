"""The paper's figures with the numbers that they lack: attention per segment, the space of vectors, and the one word."""
