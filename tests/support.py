"""What tests see of an optimizer beside its public face: the only test file that reads our underscores."""


def parts(optimizer):
    """The optimizer's parts, see ``grit_optim.parts``."""
    return optimizer._parts


def sites(optimizer):
    """The pairs that it works on, in the model's order."""
    return parts(optimizer).sites.all


def mode(optimizer):
    """Its way to use the curvature."""
    return parts(optimizer).preconditioning.mode


def waiting(optimizer):
    """How many backward passes of a pair each bucket has yet to add up."""
    return parts(optimizer).capture.waiting
