"""How many directions each pair keeps, and how the others are given up."""
