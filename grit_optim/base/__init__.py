"""The base optimizer: the wrapper around it, which ones can be wrapped, their settings and their moments."""
