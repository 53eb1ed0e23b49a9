"""The rank of each site: how many directions it keeps, and how the others are given up."""
