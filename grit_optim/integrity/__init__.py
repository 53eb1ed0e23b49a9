"""Nothing by halves: what a saved state may hold, and how everything is put back after a failure."""
