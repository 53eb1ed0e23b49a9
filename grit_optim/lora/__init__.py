"""The LoRA pairs of a model: how they are found, stacked and followed."""
