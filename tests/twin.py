"""A slow twin of the taps: keeps x and g whole and computes Σ hhᵀ, Σ δδᵀ from them in float64."""

import torch
from tiny import trained
from torch import nn
from torch.nn import functional as F

from grit_optim import GritOptimizer

# The mean over all tokens in the loss's own units, so that factor · samples is the plain sum over tokens.
SUMS = {"precondition": "none", "fisher_decay": None, "max_tokens": None, "damping": "absolute"}


def still(model, **options):
    """GritOptimizer whose base never moves a weight."""
    return GritOptimizer(torch.optim.SGD(trained(model), lr=0.0), model, **{**SUMS, **options})


def warm(model, std=0.1):
    """B away from zero, so that δ is not zero."""
    generator = torch.Generator().manual_seed(7)
    for name, p in model.named_parameters():
        if p.requires_grad and ("lora_B" in name or "up." in name):
            p.data = (std * torch.randn(p.shape, generator=generator)).to(p.dtype)
    return model


def pairs_of(model, adapter="default"):
    """Name to (A's module, B's module)."""
    return {
        f"{name}.{adapter}": (layer.lora_A[adapter], layer.lora_B[adapter])
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_A") and adapter in layer.lora_A
    }


def twin_sums(pairs, run):
    """Per pair, over the backward passes in ``run()``: Σ hhᵀ, Σ δδᵀ, tokens with δ ≠ 0, Σ h·δ.

    Leaves the gradients cleared.
    """
    kept = {name: [] for name in pairs}
    last, handles = {}, []

    def hook_input(name):
        return lambda module, args, output: last.__setitem__(name, args[0].detach())

    def hook_output(name):
        def keep(module, args, output):
            x = last[name]
            if output.requires_grad:
                output.register_hook(lambda g: kept[name].append((x, g.detach())))

        return keep

    for name, (a, b) in pairs.items():
        handles += [a.register_forward_hook(hook_input(name)), b.register_forward_hook(hook_output(name))]
    run()
    for handle in handles:
        handle.remove()
    for a, b in pairs.values():
        a.weight.grad = b.weight.grad = None
    return {name: _sums(*pairs[name], kept[name]) for name in pairs}


def _sums(a, b, uses):
    assert len(uses) > 0
    h, delta = (torch.cat(parts) for parts in zip(*(_rows(a, b, x, g) for x, g in uses), strict=True))
    matters = (delta != 0).any(-1)
    h, delta = h[matters], delta[matters]
    return h.T @ h, delta.T @ delta, int(matters.sum()), float((h * delta).sum())


def _rows(a, b, x, g):
    """h = A x and δ = (s g) B by the formula, ``[tokens, r]``; ``g`` is the gradient behind s·B."""
    x, g, A, B = (t.detach().double() for t in (x, g, a.weight, b.weight))
    if isinstance(a, nn.Conv2d):
        h = F.conv2d(x, A, stride=a.stride, padding=a.padding)
        delta = torch.einsum("nohw,or->nrhw", g, B.flatten(1))
        return tuple(t.permute(0, 2, 3, 1).flatten(0, 2) for t in (h, delta))
    return tuple(t.flatten(0, -2) for t in (x @ A.T, g @ B))


def folded_sums(optimizer):
    """The same four from an optimizer of :func:`still` that made one step, as far as it keeps them."""
    sites = optimizer.state_dict()["grit"]["sites"]
    return {
        name: (
            s["activation"] * s["activation_samples"],
            s["gradient"] * s["gradient_samples"],
            int(s["gradient_samples"]),
        )
        for name, s in sites.items()
    }


def assert_sums_agree(optimizer, expected, relative=1e-4, sites=None):
    """Every pair's sums, entry by entry relative to the largest, and its exact number of tokens."""
    got = folded_sums(optimizer)
    assert got.keys() == expected.keys()
    assert len(got) == (sites or 14)
    for name, (activation, gradient, rows, _) in expected.items():
        assert got[name][2] == rows, name
        for ours, theirs in ((got[name][0], activation), (got[name][1], gradient)):
            assert float(theirs.abs().max()) > 0, name
            assert_near(ours, theirs, relative, name)


def assert_near(ours, theirs, relative, name=""):
    error = float((ours.double() - theirs.double()).abs().max() / theirs.abs().max())
    assert error <= relative, f"{name}: relative error {error:.2e}\n{ours}\n{theirs}"


def assert_equal(left, right):
    """Bit for bit, and never over nothing."""
    assert left.keys() == right.keys()
    assert len(left) >= 2
    for name in left:
        assert torch.equal(left[name], right[name]), name


def differing(left, right):
    return sum(not torch.equal(left[name], right[name]) for name in left)
