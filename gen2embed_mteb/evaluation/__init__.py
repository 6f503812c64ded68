"""Code that all evaluations share: the images, vectors and reports of a run, and tables of figures."""
