"""``direction_momentum``: the base's average of the pairs' gradients forgets as fast as the option says."""

import copy

import pytest
import tiny
import torch
from torch import nn

from grit_optim import GritOptimizer, for_trainer
from grit_optim.preconditioners.modes import mode_named

STEPS = 12


def started():
    """A model whose factors say something from the first step on: with B at zero the first δ are zero."""
    model = tiny.llama()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.02)
    return model


def trained_with(make, momentum=None, steps=STEPS, **options):
    """The weights, and the optimizer, after some steps of a model that starts the same each time."""
    model = started()
    optimizer = GritOptimizer(
        make(tiny.trained(model)), model, kfac_min_samples=1, direction_momentum=momentum, **options
    )
    tiny.train(model, optimizer, steps)
    return tiny.weights(model), optimizer, model


def assert_same(one, other, atol=1e-5):
    assert len(one) == len(other) == 28
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=atol)


def distance(one, other):
    assert len(one) == len(other) == 28
    return sum((one[name] - other[name]).norm().item() for name in one)


def adamw(beta1):
    return lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(beta1, 0.99))


@pytest.mark.parametrize("beta1", [0.9, 0.8, 0.3])
def test_whatever_beta1_is_the_default_walks_as_with_that_of_the_momentum(beta1):
    wanted, its_own, found = (
        trained_with(adamw(b), m)[0] for b, m in ((0.6, "base"), (beta1, "base"), (beta1, None))
    )
    # Not equal: steps blow rounding up.
    assert distance(found, wanted) < 0.02 * distance(its_own, wanted)


@pytest.mark.parametrize("mode", ["spectral", "steer"])
@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_sgds_buffer_forgets_too(monkeypatch, mode, dampening):
    def sgd(momentum):
        return lambda p: torch.optim.SGD(p, lr=1e-2, momentum=momentum, dampening=dampening)

    monkeypatch.setattr(mode_named(mode), "gradient_share", 0.2)
    options = {"precondition": mode, "step_length": 0.5}
    runs = ((0.6, "base"), (0.9, "base"), (0.9, 0.6))
    wanted, its_own, found = (trained_with(sgd(m), w, **options)[0] for m, w in runs)
    # torch takes the first gradient whole, whatever the dampening is, and another share of it is forgotten.
    assert distance(found, wanted) < (0.01 if dampening == 0 else 0.2) * distance(its_own, wanted)


def test_the_average_is_that_of_the_gradients():
    model = started()
    optimizer = GritOptimizer(adamw(0.9)(tiny.trained(model)), model, kfac_min_samples=1)
    tiny.train(model, optimizer, 3)
    average = {p: optimizer.state[p]["exp_avg"].clone() for p in tiny.trained(model)}
    for seed in range(5):
        tiny.loss_of(model, seed).backward()
        for p in average:
            average[p].lerp_(p.grad, 0.4)
        optimizer.step()
        optimizer.zero_grad()
    for p, wanted in average.items():
        torch.testing.assert_close(
            optimizer.state[p]["exp_avg"], wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item()
        )


@pytest.mark.parametrize("kind", ["AdamW8bit", "PagedAdamW8bit", "AdamW"])
def test_bitsandbytes_average_forgets_too(kind):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    make = getattr(bitsandbytes.optim, kind)
    small = {"min_8bit_size": 16} if "8bit" in kind else {}
    wanted, _, _ = trained_with(lambda p: torch.optim.AdamW(p, lr=1e-3, betas=(0.6, 0.99)), "base")
    found, optimizer, model = trained_with(lambda p: make(p, lr=1e-3, betas=(0.9, 0.99), **small))
    stored = {optimizer.state[p]["state1"].dtype for p in tiny.trained(model)}
    assert stored == {torch.uint8 if small else torch.float32}
    stale, _, _ = trained_with(lambda p: make(p, lr=1e-3, betas=(0.9, 0.99), **small), "base")
    assert distance(found, wanted) < (0.5 if small else 0.05) * distance(stale, wanted)


def test_parameters_outside_the_pairs_keep_the_bases_own():
    model = started()
    head = nn.Parameter(torch.zeros(3))
    optimizer = GritOptimizer(adamw(0.9)([*tiny.trained(model), head]), model)
    expected = torch.zeros(3)
    for seed in range(4):
        (tiny.loss_of(model, seed) + (head * (seed + 1.0)).sum()).backward()
        expected.lerp_(head.grad, 0.1)
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(optimizer.state[head]["exp_avg"], expected)


def test_pairs_whose_factors_are_not_ready_keep_the_bases_own():
    model, plain = tiny.llama(), tiny.llama()
    optimizer = GritOptimizer(adamw(0.9)(tiny.trained(model)), model, kfac_min_samples=10**6)
    base = adamw(0.9)(tiny.trained(plain))
    tiny.train(model, optimizer, 4)
    tiny.train(plain, base, 4)
    assert_same(tiny.weights(model), tiny.weights(plain), atol=0)


def test_a_beta1_of_zero_stays_zero():
    """An average that is the newest gradient alone does not say what came before it."""
    assert_same(trained_with(adamw(0.0))[0], trained_with(adamw(0.0), "base")[0], atol=0)


def test_a_schedule_may_change_beta1():
    model, steady = started(), started()
    start = tiny.weights(model)
    changing, fixed = (
        GritOptimizer(adamw(0.9)(tiny.trained(m)), m, kfac_min_samples=1) for m in (model, steady)
    )
    for seed in range(5):
        changing.param_groups[0]["betas"] = (0.95 - 0.05 * seed, 0.99)
        for m, optimizer in ((model, changing), (steady, fixed)):
            tiny.loss_of(m, seed).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert distance(tiny.weights(model), tiny.weights(steady)) < 0.01 * distance(tiny.weights(steady), start)


def test_maximizing_is_minimizing_the_negative():
    model, negative = started(), started()
    up = GritOptimizer(
        torch.optim.AdamW(tiny.trained(model), lr=1e-2, maximize=True), model, kfac_min_samples=1
    )
    down = GritOptimizer(torch.optim.AdamW(tiny.trained(negative), lr=1e-2), negative, kfac_min_samples=1)
    for seed in range(6):
        (-tiny.loss_of(model, seed)).backward()
        up.step()
        up.zero_grad()
        tiny.loss_of(negative, seed).backward()
        down.step()
        down.zero_grad()
    assert_same(tiny.weights(model), tiny.weights(negative))


def test_a_resumed_run_goes_on_exactly():
    _, optimizer, model = trained_with(adamw(0.9), steps=5)
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    tiny.train(model, optimizer, 4)
    again = started()
    again.load_state_dict(weights)
    resumed = GritOptimizer(adamw(0.9)(tiny.trained(again)), again, kfac_min_samples=1)
    resumed.load_state_dict(saved)
    tiny.train(again, resumed, 4)
    assert_same(tiny.weights(again), tiny.weights(model), atol=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.Adafactor(p, lr=0.1),
        lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, centered=True),
        adamw(0.0),
    ],
)
def test_a_base_without_such_an_average_is_refused(make):
    model = started()
    with pytest.raises(
        ValueError,
        match=r"direction_momentum=0\.5 is for the average of the gradient that a base keeps, and \w+ keeps",
    ):
        GritOptimizer(make(tiny.trained(model)), model, direction_momentum=0.5)


def test_a_trainers_factory_still_hands_sgd_its_own_momentum():
    model = tiny.llama()
    optimizer = for_trainer(model, base=torch.optim.SGD, lr=0.1, momentum=0.9, direction_momentum=0.5)
    assert optimizer.defaults["momentum"] == 0.9
    assert optimizer.options.preconditioning.direction_momentum == 0.5


class ApartAdam(torch.optim.Optimizer):
    """Adam that keeps its averages in a dtype of its own, as optimizers for bf16 weights do."""

    def __init__(self, params, dtype, lr=1e-2):
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99), "eps": 1e-8})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            state = self.state[p]
            if not state:
                state["step"] = 0
                state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(p, dtype=self.dtype) for _ in "12")
            state["step"] += 1
            gradient = p.grad.to(self.dtype)
            state["exp_avg"].lerp_(gradient, 0.1)
            state["exp_avg_sq"].mul_(0.99).addcmul_(gradient, gradient, value=0.01)
            corrected = [1 - b ** state["step"] for b in (0.9, 0.99)]
            denominator = (state["exp_avg_sq"] / corrected[1]).sqrt() + 1e-8
            p.sub_((1e-2 / corrected[0] * state["exp_avg"] / denominator).to(p.dtype))


@pytest.mark.parametrize("mode", ["spectral", "steer", "eigenbasis", "balanced", "inverse"])
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
def test_averages_in_another_dtype_than_the_weights(weights, kept, mode):
    model = started().to(weights)
    optimizer = GritOptimizer(
        ApartAdam(tiny.trained(model), kept), model, kfac_min_samples=1, precondition=mode
    )
    before = float(tiny.loss_of(model))
    tiny.train(model, optimizer, STEPS)
    averages = [optimizer.state[p]["exp_avg"] for p in tiny.trained(model)]
    assert all(average.dtype == kept and average.isfinite().all() for average in averages)
    assert float(tiny.loss_of(model)) < before
