"""Whether GRIT is ahead of the AdamW that it wraps at the learning rate that a user already has."""
