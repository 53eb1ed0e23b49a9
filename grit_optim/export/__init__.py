"""Adapters on disk, and adapters cut to the ranks that they keep."""
