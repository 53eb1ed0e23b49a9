"""How much enters the factors, in which steps, and what they do not depend on."""

import contextlib

import pytest
import torch
from tiny import grit, llama, loss_of, tokens, trained, weights
from twin import assert_near, folded_sums, still, warm

# -------------------------------------------------------------------- bounds and periods


def rows_seen(model, optimizer, micro_batches):
    """Tokens that one step adds per site: 44 of four sequences of 12, whose last token predicts nothing."""
    before = optimizer.telemetry()["samples"]
    for seed in range(micro_batches):
        loss_of(model, seed).backward()
    optimizer.step()
    optimizer.zero_grad()
    after = optimizer.telemetry()["samples"]
    return {name: after[name] - before[name] for name in after}


@pytest.mark.parametrize("bound", [1, 5, 10, 16, 31, 44, 48, 1000])
def test_max_tokens_bounds_a_step(bound):
    model = warm(llama())
    optimizer = still(model, max_tokens=bound)
    counts = [rows_seen(model, optimizer, 1) for _ in range(4)]
    assert max(max(c.values()) for c in counts) <= bound
    assert max(max(c.values()) for c in counts) >= min(44, bound // 2)


@pytest.mark.parametrize("micro_batches", [2, 3, 7])
@pytest.mark.parametrize("bound", [10, 16, 50])
def test_max_tokens_bounds_an_accumulated_step_from_the_second_on(bound, micro_batches):
    model = warm(llama())
    optimizer = still(model, max_tokens=bound)
    rows_seen(model, optimizer, micro_batches)
    counts = [rows_seen(model, optimizer, micro_batches) for _ in range(4)]
    assert max(max(c.values()) for c in counts) <= bound
    assert max(max(c.values()) for c in counts) >= bound // 4


def test_subsample_meets_the_full_mean():
    """Over as many steps as the stride is long every token has entered exactly once."""
    model = warm(llama())
    whole, part = still(model), still(model, max_tokens=8)
    for _ in range(6):  # 48 tokens, every sixth
        loss_of(model).backward()
        whole.step()
        part.step()
        part.zero_grad()
        whole.zero_grad()
    full, sampled = folded_sums(whole), folded_sums(part)
    assert len(full) == 14
    for name, (activation, gradient, rows) in sampled.items():
        assert rows * 6 == full[name][2]
        assert 40 * 6 <= full[name][2] <= 44 * 6
        assert_near(activation * 6, full[name][0], 1e-4, name)
        assert_near(gradient * 6, full[name][1], 1e-4, name)


@pytest.mark.parametrize(("period", "expected"), [(1, range(8)), (2, [0, 1, 3, 5, 7]), (3, [0, 1, 4, 7])])
def test_cov_update_freq_decides_which_steps_record(period, expected):
    """Step 0 records too: B = 0 there as a rule, so the count of the periods starts at step 1."""
    model = warm(llama())
    optimizer = still(model, cov_update_freq=period)
    counts = [rows_seen(model, optimizer, 1) for _ in range(8)]
    assert [max(count.values()) for count in counts] == [44 * (step in expected) for step in range(8)]
    # A query that sees one key has δ = 0 up to rounding, so that a site may see up to four tokens less.
    assert all(min(count.values()) >= 40 * (step in expected) for step, count in enumerate(counts))
    assert optimizer.telemetry()["steps"] == 8


# -------------------------------------------------------------------- what the statistics do not depend on


def relative_factors(model, run):
    optimizer = still(model, damping="relative")
    run()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer.state_dict()["grit"]["sites"]


@pytest.mark.parametrize("change", ["loss times 1000", "loss times 1024", "batch twice", "accumulated twice"])
def test_relative_factors_do_not_know_the_losss_unit(change):
    model = warm(llama())
    ids = tokens()
    twice = torch.cat((ids, ids))
    changed = {
        "loss times 1000": lambda: (1000 * loss_of(model)).backward(),
        "loss times 1024": lambda: (1024 * loss_of(model)).backward(),
        "batch twice": lambda: model(input_ids=twice, labels=twice).loss.backward(),
        "accumulated twice": lambda: [(loss_of(model) / 2).backward() for _ in range(2)],
    }[change]
    plain = relative_factors(model, lambda: loss_of(model).backward())
    other = relative_factors(model, changed)
    # A query that sees one key has δ = 0 up to rounding, so the unit may decide whether such a token counts.
    names = [name for name in plain if change == "loss times 1024" or "q_proj" not in name]
    assert len(names) == (14 if change == "loss times 1024" else 12)
    for name in names:
        assert_near(other[name]["activation"], plain[name]["activation"], 1e-5, name)
        assert_near(
            other[name]["gradient"], plain[name]["gradient"], 1e-5 if len(names) == 14 else 1e-3, name
        )
    mean_trace = sum(float(site["gradient"].trace()) / 4 for site in plain.values()) / 14
    assert mean_trace == pytest.approx(1.0, rel=1e-4)


@contextlib.contextmanager
def spoiled(model, value):
    """One entry of the logits' gradient is inf or NaN."""

    def spoil(g):
        g = g.clone()
        g[0, 3, 0] = value
        return g

    def hook(module, args, output):
        output.register_hook(spoil)

    handle = model.get_output_embeddings().register_forward_hook(hook)
    yield
    handle.remove()


@pytest.mark.parametrize("value", [float("inf"), float("nan")], ids=["inf", "nan"])
@pytest.mark.parametrize("mode", ["spectral", "steer", "inverse", "eigenbasis", "balanced"])
def test_non_finite_gradients_are_dropped_and_counted(mode, value):
    """Statistics are left out and the base sees zero gradients, as if the step's loss had been constant."""
    ours, reference = warm(llama()), warm(llama())
    options = {"precondition": mode, "kfac_update_freq": 1, "fisher_decay": None}
    optimizer, twin = grit(ours, **options), grit(reference, **options)
    for seed in range(2):
        for model, stepped in ((ours, optimizer), (reference, twin)):
            loss_of(model, seed).backward()
            stepped.step()
            stepped.zero_grad()
    samples = optimizer.telemetry()["samples"]
    with spoiled(ours, value):
        loss_of(ours, 2).backward()
    assert not all(torch.isfinite(p.grad).all() for p in trained(ours))
    optimizer.step()
    optimizer.zero_grad()
    assert optimizer.telemetry()["samples"] == samples
    assert optimizer.telemetry()["dropped_folds"] == 1
    (loss_of(reference, 2) * 0).backward()
    twin.step()
    twin.zero_grad()
    for model, stepped in ((ours, optimizer), (reference, twin)):
        loss_of(model, 3).backward()
        stepped.step()
    after = weights(reference)
    assert len(after) == 28
    assert all(torch.equal(value, after[name]) for name, value in weights(ours).items())
    assert all(torch.isfinite(value).all() for value in after.values())
    assert optimizer.telemetry()["dropped_folds"] == 1
    assert max(n - samples[name] for name, n in optimizer.telemetry()["samples"].items()) == 44
