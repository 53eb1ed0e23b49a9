"""What the forward and backward passes of a step show: activations and gradients at each pair, and the loss."""
