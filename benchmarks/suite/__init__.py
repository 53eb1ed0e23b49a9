"""Several optimizers, tasks and budgets, each at the best learning rate that a search finds."""
