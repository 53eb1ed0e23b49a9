"""What dropping directions of a trained adapter costs: predicted, and measured."""
