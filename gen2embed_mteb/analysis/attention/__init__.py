"""How much attention the prompt, the image and the user's text receive (paper, Eq. 1 and Fig. 1)."""
