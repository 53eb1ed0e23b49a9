"""What a step's forward and backward passes show: activations and gradients at each site, and the loss."""
