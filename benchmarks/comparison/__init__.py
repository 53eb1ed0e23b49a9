"""Optimizers compared on one task: losses at equal steps and equal times, as a table and figures."""
