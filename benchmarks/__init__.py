"""Benchmarks of `grit_optim` against other optimizers: base model, tasks, runs, reports."""
