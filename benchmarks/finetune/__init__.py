"""`python -m benchmarks train`: LoRA or QLoRA on a model and data of one's own, with any optimizer."""
