"""The predicted cost of dropping directions, in units of the loss."""

import pytest
import support
import tiny
import torch
import twin

from grit_optim import GritOptimizer, linalg
from grit_optim.capture.sums import Sums
from grit_optim.curvature.units import loss_tokens
from grit_optim.rank import moves

CPU = torch.device("cpu")


def still(model, **options):
    """An optimizer that gathers and changes nothing."""
    base = torch.optim.SGD(tiny.trained(model), lr=0.0)
    settings = {"precondition": "none", "fisher_decay": None, "max_tokens": None, "kfac_min_samples": 1}
    return GritOptimizer(base, model, **{**settings, **options})


def answer_loss(model, ids, prompt):
    """The mean loss over the tokens after the first ``prompt`` of each row."""
    labels = ids.clone()
    labels[:, :prompt] = -100
    return model(input_ids=ids, labels=labels).loss


def test_the_scored_tokens_are_counted_where_only_they_have_a_gradient():
    """N, behind the last attention; T, everywhere before it."""
    model = tiny.llama(init_lora_weights=False)
    optimizer = still(model)
    answer_loss(model, tiny.tokens(batch=4, length=12), prompt=5).backward()
    sums = support.parts(optimizer).capture.collect().sums
    assert float(loss_tokens(sums, [torch.zeros(14, dtype=torch.bool)])) == 4 * 7
    # The last token is never an input of anything that is scored.
    assert float(sums[0].tokens.max()) == 4 * 11


@pytest.mark.parametrize("damping", ["relative", "absolute"])
@pytest.mark.parametrize("max_tokens", [None, 8])
def test_price_times_factors_is_half_n_t_times_the_product(damping, max_tokens):
    """Whatever the factors' units and however few tokens enter them, the price is in the loss's unit."""
    model = tiny.llama(init_lora_weights=False)

    def run():
        answer_loss(model, tiny.tokens(), prompt=5).backward()

    known = twin.twin_sums(twin.pairs_of(model), run)
    optimizer = still(model, damping=damping, max_tokens=max_tokens)
    run()
    optimizer.step()
    curvature = optimizer.curvature[0]
    for i, name in enumerate(curvature.bucket.names()):
        *_, rows, _ = known[name]
        raw = curvature.factors.gradient[i].double()
        priced = float(curvature.factors.price[i]) * float(raw.diagonal().sum())
        whole = known[name][1].diagonal().sum() / rows  # tr Σ_g in the loss's own units
        expected = 0.5 * 28 * rows * float(whole)
        assert priced == pytest.approx(expected, rel=1e-4 if max_tokens is None else 1.0), name


def test_tokens_of_a_subsample_count_for_those_left_out():
    model = tiny.llama(init_lora_weights=False)
    optimizer = still(model, max_tokens=8)
    tiny.loss_of(model).backward()
    sums = support.parts(optimizer).capture.collect().sums[0]
    assert float(sums.rows.max()) <= 8
    assert sums.tokens.tolist() == pytest.approx([44.0] * 14, rel=0.2)


@pytest.mark.parametrize("by_gradients", [True, False])
def test_where_no_tap_saw_a_token_the_loss_counts_as_of_one(by_gradients):
    sums = Sums.zeros(2, 3, CPU)
    sums.tokens += float(by_gradients)
    assert loss_tokens([sums], [torch.full((2,), by_gradients)]).item() == 1


def test_the_prediction_is_the_divergence_that_a_cut_causes():
    """For labels drawn from the model the Fisher matrix is exact and the expected rise is the KL divergence.

    No noise is left in what is measured, so the constant ½·N·T is seen. One site at a time loses half of its
    directions.
    """
    model = tiny.llama(rank=4, init_lora_weights=False).double()
    optimizer = still(model, damping="absolute")
    generator = torch.Generator().manual_seed(1)
    inputs = [tiny.tokens(seed, batch=8) for seed in range(2)]
    with torch.no_grad():
        before = [model(input_ids=ids).logits.log_softmax(-1) for ids in inputs]
    for _ in range(16):
        for ids, log in zip(inputs, before, strict=True):
            drawn = torch.multinomial(log.exp().flatten(0, 1), 1, generator=generator)[:, 0]
            logits = model(input_ids=ids).logits.flatten(0, 1)
            torch.nn.functional.cross_entropy(logits, drawn).backward()
            optimizer.step()
            optimizer.zero_grad()
    curvature = optimizer.curvature[0]
    found = moves.coordinates(curvature, 1e-6)
    ratios = []
    for i, site in enumerate(curvature.bucket.sites):
        b = site.b.detach().clone()
        keep = linalg.leading_mask(torch.tensor([2]), 4)[0]
        site.b.data = b @ ((found.inverse[i] * keep) @ found.transform[i])
        predicted = float(curvature.factors.price[i] * found.energy[i, 2:].sum())
        with torch.no_grad():
            after = [model(input_ids=ids).logits.log_softmax(-1) for ids in inputs]
        divergence = torch.stack(
            [(p.exp() * (p - q)).sum(-1).mean() for p, q in zip(before, after, strict=True)]
        ).mean()
        ratios.append(float(divergence) / predicted)
        site.b.data = b
    assert len(ratios) == 14
    assert 0.7 < torch.tensor(ratios).median() < 1.5, ratios
    assert min(ratios) > 0.5, ratios
    assert max(ratios) < 3, ratios
