"""The LoRA pairs (sites) of a model: finding them, stacking them by rank, following changes of the model."""
