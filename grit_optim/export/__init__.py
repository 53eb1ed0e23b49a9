"""Save adapters, and cut adapters to the ranks that they keep."""
