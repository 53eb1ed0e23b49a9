"""What a checkpoint holds of the parts of an optimizer."""
