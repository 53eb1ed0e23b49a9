"""One step taken by hand after a little training: what the tests of the modes compare with their formulas."""

import tiny
import torch

from grit_optim import GritOptimizer


def one_step(options, base_class=torch.optim.SGD, warm=3, **settings):
    """Train a little, then take one step by hand: model before, gradients, factors, model after."""
    model = tiny.llama(init_lora_weights=False).double()  # B ≠ 0, and small steps are not lost in rounding
    base = base_class(tiny.trained(model), **{"lr": 1e-2, **settings})
    optimizer = GritOptimizer(base, model, **{"kfac_min_samples": 8, **options})
    tiny.train(model, optimizer, warm)
    before = tiny.weights(model)
    tiny.loss_of(model, 99).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer.step()
    return model, optimizer, before, gradients


def sites_of(model, optimizer):
    """(name of A, name of B, Σ_a, Σ_g) per site, factors in float64."""
    names = {id(p): n for n, p in model.named_parameters()}
    for curvature in optimizer.curvature:
        for i, site in enumerate(curvature.bucket.sites):
            factors = curvature.factors
            yield (
                names[id(site.a)],
                names[id(site.b)],
                factors.activation[i].double(),
                factors.gradient[i].double(),
            )
