"""The K-FAC pairing does not depend on the coordinates of the pair; the paper's does."""

import tiny
import torch

from grit_optim import GritOptimizer, Site


def first_order_update(transform, pairing, seed=0):
    """ΔB·A + B·ΔA of one natural-gradient step with SGD, the pair written as (T A, B T⁻¹)."""
    torch.manual_seed(seed)
    model = tiny.HandWritten().double()
    torch.nn.init.normal_(model.up.weight)
    with torch.no_grad():
        model.down.weight.copy_(transform @ model.down.weight)
        model.up.weight.copy_(model.up.weight @ torch.linalg.inv(transform))
    sites = [Site.from_modules("only", model.down, model.up, model.scaling)]
    optimizer = GritOptimizer(
        torch.optim.SGD([model.down.weight, model.up.weight], lr=1e-3),
        model,
        sites=sites,
        precondition="inverse",
        pairing=pairing,
        step_length="natural",
        damping="absolute",
        kfac_damping=1e-10,
        kfac_min_samples=1,
    )
    a, b = model.down.weight.detach().clone(), model.up.weight.detach().clone()
    x, target = torch.randn(40, 6, dtype=torch.float64), torch.randn(40, 5, dtype=torch.float64)
    (model(x) - target).square().mean().backward()
    optimizer.step()
    return (model.up.weight.detach() - b) @ a + b @ (model.down.weight.detach() - a)


def change():
    generator = torch.Generator().manual_seed(5)
    return torch.eye(3, dtype=torch.float64) + 0.4 * torch.randn(
        3, 3, generator=generator, dtype=torch.float64
    )


def test_kfac_pairing_is_invariant():
    plain = first_order_update(torch.eye(3, dtype=torch.float64), "kfac")
    torch.testing.assert_close(
        first_order_update(change(), "kfac"), plain, rtol=2e-3, atol=2e-3 * plain.abs().max().item()
    )


def test_paper_pairing_is_not():
    plain = first_order_update(torch.eye(3, dtype=torch.float64), "paper")
    moved = first_order_update(change(), "paper")
    assert (moved - plain).norm() > 0.1 * plain.norm()


def test_without_curvature_the_step_depends_on_the_coordinates():
    """The control: an optimizer that ignores the curvature is not invariant, so the test above can fail."""
    torch.manual_seed(0)
    updates = []
    for transform in (torch.eye(3, dtype=torch.float64), change()):
        torch.manual_seed(0)
        a, b = torch.randn(3, 6, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
        a, b = transform @ a, b @ torch.linalg.inv(transform)
        gradient = torch.ones(5, 6, dtype=torch.float64)
        updates.append(gradient @ a.mT @ a + b @ b.mT @ gradient)
    assert (updates[0] - updates[1]).norm() > 0.1 * updates[0].norm()
