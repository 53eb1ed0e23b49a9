"""One training run, and many of them in processes of their own."""
