"""Time, memory and operations of an optimizer's step, on a task and on the shapes of large models."""
