"""The methods that GRIT is compared with, each through its own package (the extra `peers` installs them)."""
