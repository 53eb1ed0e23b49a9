"""The commands of ``python -m grit_optim``."""
