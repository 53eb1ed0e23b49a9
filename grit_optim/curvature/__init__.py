"""Approximations of the Fisher information of each LoRA pair, and what is derived from them."""
