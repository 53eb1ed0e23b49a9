"""The optimizer that is wrapped: which ones can be, their settings, and their moments."""
