"""The adaptive schedule against a slow twin, and where the losses come from."""

import copy
import itertools
import math
import statistics

import pytest
import support
import tiny
import torch

from grit_optim.options import ScheduleOptions
from grit_optim.schedules import Schedule

PERIODS = {"kfac_update_freq": 8, "reprojection_freq": 40}
ASKED = {**PERIODS, "kfac_damping": 0.1}


def schedule(**options):
    return Schedule(ScheduleOptions(**{"adaptive_schedule": True, **PERIODS, **options}))


def twin(losses):
    """(periods' factor, damping's factor) after all losses, from whole lists."""
    halves = [losses[i : i + 10] for i in range(0, len(losses) - 9, 10)][
        :-1
    ]  # the last one is still on its way
    if not halves:
        return 1.0, 1.0
    means = [sum(half) / 10 for half in halves]
    differences = [[b - a for a, b in itertools.pairwise(half)] for half in halves]
    noises = [statistics.stdev(d) / math.sqrt(2) / mean for d, mean in zip(differences, means, strict=True)]
    period = 1.0 if len(means) < 2 else 1.5 if means[-1] < 0.99 * means[-2] else 0.75
    return period, min(4.0, max(0.25, noises[-1] / noises[0]))


def series(kind):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(100, generator=generator, dtype=torch.float64)
    steps = torch.arange(100, dtype=torch.float64)
    return {
        "falling": 4 * torch.exp(-steps / 40) + 0.01 * noise,
        "stalled": 2 + 0.01 * noise,
        "growing noise": 3 + 0.01 * noise * (1 + steps / 10),
        "wild": 3 + 0.01 * noise * (1 + 99 * (steps >= 10)),
        "calm": 3 + 0.01 * noise * (1 - 0.99 * (steps >= 10)),
    }[kind]


@pytest.mark.parametrize("as_tensor", [False, True], ids=["floats", "tensors"])
@pytest.mark.parametrize("kind", ["falling", "stalled", "growing noise", "wild", "calm"])
def test_the_scales_are_the_slow_twins_at_every_step(kind, as_tensor):
    losses, subject = series(kind).tolist(), schedule()
    for i, loss in enumerate(losses):
        subject.advance(torch.tensor(loss, dtype=torch.float64) if as_tensor else loss)
        expected = twin(losses[: i + 1])
        assert (subject.period_scale, subject.damping_scale) == pytest.approx(expected, rel=1e-9), i


@pytest.mark.parametrize(
    ("kind", "refresh", "reprojection"), [("falling", 12, 60), ("stalled", 6, 30)], ids=["falling", "stalled"]
)
def test_periods_lengthen_while_the_loss_falls_and_shorten_when_it_stalls(kind, refresh, reprojection):
    subject = schedule()
    for loss in series(kind)[:60].tolist():
        subject.advance(loss)
    assert (subject.kfac_update_freq, subject.reprojection_freq) == (refresh, reprojection)


def test_damping_follows_the_noise_within_its_bounds():
    scales = {}
    for kind in ("wild", "calm"):
        subject = schedule()
        for loss in series(kind).tolist():
            subject.advance(loss)
        scales[kind] = subject.damping_scale
    assert scales == pytest.approx({"wild": 4, "calm": 0.25})


def test_a_period_of_one_stays_one():
    subject = schedule(kfac_update_freq=1)
    for kind in ("stalled", "falling"):
        for loss in series(kind).tolist():
            subject.advance(loss)
        assert subject.kfac_update_freq == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_decides_nothing(bad):
    subject = schedule()
    for i, loss in enumerate(series("falling").tolist()):
        subject.advance(bad if 40 <= i < 45 else loss)
        assert math.isfinite(subject.period_scale)
        assert math.isfinite(subject.damping_scale)
    assert subject.period_scale == 1.5


def test_work_is_due_when_the_period_in_force_has_passed():
    subject = schedule()
    due = []
    for step, loss in enumerate(series("falling")[:60].tolist()):
        due += [step] * subject.refresh_due()
        subject.advance(loss)
    assert due[:4] == [0, 8, 16, 24]
    assert {b - a for a, b in itertools.pairwise(due[4:])} == {12}


def test_off_means_the_plain_periods():
    subject, refreshed, reprojected = schedule(adaptive_schedule=False), [], []
    for step, loss in enumerate(series("falling").tolist()):
        refreshed += [step] * subject.refresh_due()
        reprojected += [step] * subject.reprojection_due()
        subject.advance(loss)
    assert refreshed == list(range(0, 100, 8))
    assert reprojected == [0, 40, 80]
    assert subject.in_force() == PERIODS
    assert subject.damping_scale == 1


# -------------------------------------------------------------------- in training


def pace_of(optimizer):
    """What a checkpoint keeps of the adaptive schedule."""
    return optimizer.state_dict()["grit"]["pace"]


def adaptive(model, **options):
    return tiny.grit(model, **{"precondition": "inverse", "adaptive_schedule": True, **ASKED, **options})


def test_periods_and_damping_in_force_are_used():
    """Told of a loss that falls, and that becomes calm, the optimizer refreshes less often and damps less."""
    model = tiny.llama(layers=1)
    optimizer = adaptive(model, kfac_update_freq=2)
    for seed, loss in enumerate(series("calm").tolist()):
        tiny.loss_of(model, seed).backward()
        optimizer.observe(loss - 0.03 * seed / 3)
        optimizer.step()
        optimizer.zero_grad()
        if seed == 39:
            before = optimizer.telemetry()["refreshes"]
    assert optimizer.telemetry()["refreshes"] - before == 60 / 3
    told = optimizer.telemetry()
    assert told["kfac_damping"] < 0.1
    curvature = optimizer.curvature[0]
    assert curvature.damping == told["kfac_damping"]
    factor = curvature.factors.gradient
    support.mode(optimizer).refresh(curvature)
    strength = told["kfac_damping"] * factor.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    inverse = torch.linalg.inv(factor + strength * torch.eye(4))
    torch.testing.assert_close(curvature.a_operator, inverse, rtol=1e-3, atol=1e-3)


def by_observe(model, optimizer, seed):
    loss = tiny.loss_of(model, seed)
    loss.backward()
    optimizer.observe(loss)
    optimizer.step()


def by_closure(model, optimizer, seed):
    def closure():
        loss = tiny.loss_of(model, seed)
        loss.backward()
        return loss

    optimizer.step(closure)


def by_output(model, optimizer, seed):
    tiny.loss_of(model, seed).backward()
    optimizer.step()


def by_accumulation(model, optimizer, seed):
    for _ in range(2):
        (tiny.loss_of(model, seed) / 2).backward()
    optimizer.step()


def test_every_source_of_the_loss_gives_the_same_schedule():
    told = {}
    for source in (by_observe, by_closure, by_output, by_accumulation):
        model = tiny.llama(layers=1)
        optimizer = adaptive(model, kfac_update_freq=3)
        for seed in range(45):
            source(model, optimizer, seed % 4)
            with torch.no_grad():
                tiny.loss_of(model.eval(), 99)  # evaluation in between is not the loss
            model.train()
            optimizer.zero_grad()
        state = pace_of(optimizer)
        assert state["period_scale"] != 1
        told[source.__name__] = [state[key] for key in ("period_scale", "damping_scale", "previous_mean")]
    for name, values in told.items():
        assert values == pytest.approx(told["by_observe"], rel=1e-3), name


def test_what_is_observed_goes_before_the_models_output():
    model = tiny.llama(layers=1)
    optimizer = adaptive(model)
    tiny.loss_of(model).backward()
    optimizer.observe(7.0)
    optimizer.observe(torch.tensor([9.0]))
    optimizer.step()
    assert pace_of(optimizer)["losses"] == [8.0]


def test_a_run_resumed_in_the_middle_of_a_window_goes_on_exactly():
    options = {
        "kfac_update_freq": 3,
        "reprojection": "balanced",
        "reprojection_freq": 7,
        "adaptive_schedule": True,
    }
    model = tiny.llama(layers=1)
    optimizer = tiny.grit(model, **options)
    tiny.train(model, optimizer, 34)
    saved = {name: p.clone() for name, p in model.state_dict().items()}, optimizer.state_dict()
    fresh_model = tiny.llama(seed=1, layers=1)
    fresh = tiny.grit(fresh_model, **options)
    fresh_model.load_state_dict(saved[0])
    fresh.load_state_dict(copy.deepcopy(saved[1]))  # torch would share the moments
    assert tiny.train(model, optimizer, 20, first=34) == tiny.train(fresh_model, fresh, 20, first=34)
    assert pace_of(optimizer) == pace_of(fresh)
    assert pace_of(optimizer)["period_scale"] != 1


def test_a_checkpoints_pace_is_left_out_by_an_optimizer_that_does_not_adapt():
    model = tiny.llama(layers=1)
    optimizer = adaptive(model)
    for seed, loss in enumerate(series("wild")[:40].tolist()):
        tiny.loss_of(model, seed).backward()
        optimizer.observe(loss)
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.telemetry()["kfac_damping"] == pytest.approx(0.4)
    resumed = adaptive(model)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.telemetry()["kfac_damping"] == pytest.approx(0.4), "before its first refresh, too"
    plain = adaptive(model, adaptive_schedule=False)
    plain.load_state_dict(optimizer.state_dict())
    assert plain.telemetry()["kfac_damping"] == 0.1
    assert plain.telemetry()["kfac_update_freq"] == 8


@pytest.mark.parametrize("returned", [None, {"loss": 3.0}, torch.ones(2)], ids=["None", "dict", "vector"])
def test_a_closure_may_return_what_it_likes(returned):
    model = tiny.llama(layers=1)
    optimizer = adaptive(model)

    def closure():
        tiny.loss_of(model).backward()
        return returned

    assert optimizer.step(closure) is returned
    assert len(pace_of(optimizer)["losses"]) == 1, "then the model's output tells"


def test_silence_is_warned_of_once():
    model = tiny.llama(layers=1)
    optimizer = adaptive(model)

    def train(steps):
        for seed in range(steps):
            model(input_ids=tiny.tokens(seed)).logits.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    with pytest.warns(UserWarning, match=r"no loss in 20 steps.*Call optimizer\.observe") as caught:
        train(45)
    assert len([w for w in caught if "no loss" in str(w.message)]) == 1


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        ("2.5", TypeError, "a number or a tensor of one value, got str"),
        (True, TypeError, "got bool"),
        (torch.ones(3), ValueError, r"shape \[3\]; pass loss\.mean\(\)"),
    ],
)
def test_observe_refuses(loss, error, message):
    with pytest.raises(error, match=message):
        tiny.grit(tiny.llama(layers=1)).observe(loss)


def test_the_model_is_hooked_only_if_the_loss_is_needed():
    model = tiny.llama(layers=1)
    plain = tiny.grit(model)
    assert not model._forward_hooks
    plain.close()
    optimizer = adaptive(model)
    assert len(model._forward_hooks) == 1
    optimizer.close()
    assert not model._forward_hooks
    logging = tiny.grit(model)
    logging.log_to(lambda record: None)
    assert len(model._forward_hooks) == 1
