"""What every evaluation shares: one run's images, vectors and reports, and tables of figures."""
