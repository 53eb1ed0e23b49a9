"""The embedded base model: its weights, its tokenizer, the text it was trained on, and its training."""
