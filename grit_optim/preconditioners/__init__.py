"""What happens to a gradient, and to a step, by the curvature: one file for each mode."""
