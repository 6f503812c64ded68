"""The paper's figures with the numbers that they lack: attention, the space of vectors, and the one word."""
