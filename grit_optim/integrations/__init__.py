"""Train with transformers' Trainer: a factory for the optimizer, and a callback."""
