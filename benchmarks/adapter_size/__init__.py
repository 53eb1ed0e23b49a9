"""Held-out loss against the bytes of the saved adapter."""
