"""What a base keeps is read by its type and shape. What is not understood is reset or left, and named."""

import warnings

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import Adam, AdamW, Optimizer, RMSprop

from grit_optim import GritOptimizer, Site
from grit_optim.base import layout, moments, transport
from grit_optim.base.settings import is_adam

EVERY_STEP = {"precondition": "balanced", "kfac_update_freq": 1, "kfac_min_samples": 8}


class Coded(torch.Tensor):
    """As torchao's 8-bit states: looks like a float tensor, is stored otherwise, and almost nothing works."""

    @staticmethod
    def __new__(cls, value):
        return torch.Tensor._make_wrapper_subclass(cls, value.shape, dtype=torch.float32)

    def __init__(self, value):
        self.codes = value.half()

    def dequantize(self):
        return self.codes.float()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.copy_.default:
            args[0].codes.copy_(args[1])
            return args[0]
        if function is torch.ops.aten.detach.default:
            return args[0]
        if function is torch.ops.aten.clone.default:
            return cls(args[0].dequantize())
        raise NotImplementedError(function)


class Keeping(Optimizer):
    """Adam's first update, keeping what ``keep(gradient)`` makes of it."""

    def __init__(self, parameters, keep):
        super().__init__(parameters, {"lr": 1e-2, "betas": (0.9, 0.99)})
        self.keep = keep

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                for name, value in self.keep(p.grad).items():
                    self.state[p].setdefault(name, value)
                p.sub_(1e-2 * p.grad.sign())


class Box:
    def __init__(self, tensor):
        self.tensor = tensor


STRANGE = {
    "a dict": lambda g: {"momentum_buffer": {0.9: g.clone()}},
    "a list": lambda g: {"GG": [g @ g.mT]},
    "an object": lambda g: {"projector": Box(g.clone())},
    "flat": lambda g: {"exp_avg": g.flatten().clone()},
    "empty": lambda g: {"exp_avg": g.new_zeros(0)},
    "a scalar": lambda g: {"exp_avg_sq": g.square().mean()},
    "integers": lambda g: {"exp_avg": g.sign().to(torch.int8)},
    "fp8": lambda g: {"exp_avg": g.to(torch.float8_e4m3fn)},
    "coded": lambda g: {"exp_avg": Coded(g.clone())},
    "another's copy of the weights": lambda g: {"z": g.clone()},
}


def two_pairs():
    torch.manual_seed(0)
    model = torch.nn.Sequential(tiny.HandWritten(), tiny.HandWritten(5, 7))
    return model, [Site.from_modules(str(i), p.down, p.up, p.scaling) for i, p in enumerate(model)]


def advance(model, optimizer, steps):
    for step in range(steps):
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x.to(model[0].down.weight.dtype)) - 1).square().mean().backward()
        optimizer.step()


def told(caught):
    return [str(w.message) for w in caught if issubclass(w.category, UserWarning)]


@pytest.mark.parametrize("keep", STRANGE.values(), ids=STRANGE)
def test_state_that_is_not_understood_is_reset_and_named_once(keep):
    model, sites = two_pairs()
    base = Keeping(tiny.trained(model), keep)
    optimizer = GritOptimizer(base, model, sites=sites, **EVERY_STEP)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        advance(model, optimizer, 4)
        optimizer.reduce_ranks_(dict.fromkeys(optimizer.ranks(), 2))
        advance(model, optimizer, 1)
        optimizer.shrink_()
    name = next(iter(keep(torch.ones(2, 2))))
    moved = [text for text in told(caught) if "changed the coordinates" in text]
    assert len(moved) == 1
    assert f"Keeping keeps state that it does not know how to move ({name}" in moved[0]
    advance(model, optimizer, 2)
    assert [p.shape[0] for p in (sites[0].a, sites[1].a)] == [2, 2]


@pytest.mark.parametrize("keep", ["flat", "empty", "integers", "fp8", "a dict"])
def test_a_moment_that_cannot_be_read_is_replaced_by_the_gradient_and_named_once(keep):
    model, sites = two_pairs()
    optimizer = GritOptimizer(
        Keeping(tiny.trained(model), STRANGE[keep]), model, sites=sites, kfac_min_samples=8
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        advance(model, optimizer, 3)
    assert len([t for t in told(caught) if "Keeping keeps" in t and "newest gradient" in t]) == 1
    assert all(p.isfinite().all() for p in tiny.trained(model))


def test_a_coded_moment_is_read_and_written_through_its_own_methods():
    parameter = torch.nn.Parameter(torch.randn(3, 4))
    base = Keeping([parameter], lambda g: {"exp_avg": Coded(g.clone()), "exp_avg_sq": Coded(g.square())})
    parameter.grad = torch.ones(3, 4)
    base.step()
    assert torch.equal(moments.first_moment(base, parameter), torch.ones(3, 4))
    assert torch.equal(moments.second_moment(base, parameter), torch.ones(3, 4))
    moments.set_first_moment(base, [parameter], [torch.full((3, 4), 2.0)])
    assert torch.equal(moments.first_moment(base, parameter), torch.full((3, 4), 2.0))


class CountingPerGroup(Keeping):
    """Sets its mask up in the first step of the group alone, as SARA does."""

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        group["step"] = group.get("step", 0) + 1
        for p in group["params"]:
            if group["step"] == 1:
                self.state[p]["mask"] = p > 0
            p.sub_(1e-2 * p.grad * self.state[p]["mask"])


def test_a_base_that_counts_steps_per_group_starts_the_group_anew():
    model, sites = two_pairs()
    base = CountingPerGroup(tiny.trained(model), None)
    optimizer = GritOptimizer(base, model, sites=sites, **EVERY_STEP)
    with pytest.warns(UserWarning, match=r"mask \(Tensor \[3, 6\] of bool\)"):
        advance(model, optimizer, 4)
    assert base.param_groups[0]["step"] == 1


class Inside(Optimizer):
    """As Lookahead: steps another optimizer, whose state is its own."""

    def __init__(self, inner):
        self.inner = inner
        super().__init__(inner.param_groups, {})
        self.param_groups = inner.param_groups

    def step(self):
        self.inner.step()


def test_the_state_of_an_optimizer_inside_the_base_is_reset_too():
    model, sites = two_pairs()
    inner = AdamW(tiny.trained(model), lr=1e-2)
    optimizer = GritOptimizer(Inside(inner), model, sites=sites, kfac_min_samples=8)
    advance(model, optimizer, 3)
    with pytest.warns(UserWarning, match=r"exp_avg \(Tensor \[\d, \d\] of float32\)"):
        optimizer.reduce_ranks_(dict.fromkeys(optimizer.ranks(), 2))
    advance(model, optimizer, 1)
    with pytest.warns(UserWarning, match=r"cut the state that Inside keeps \(exp_avg"):
        optimizer.shrink_()
    advance(model, optimizer, 1)
    assert {inner.state[p]["exp_avg"].shape for p in inner.state} == {p.shape for p in tiny.trained(model)}


# -------------------------------------------------------------------- which update is Adam's


class PAdam(Adam):
    def step(self):
        """Steps by another measure."""


class Told(AdamW):
    def step(self, closure=None):
        return super().step(closure)


class Plain(AdamW):
    pass


@pytest.mark.parametrize(
    ("kind", "is_one"), [(Adam, True), (Plain, True), (Told, True), (PAdam, False), (RMSprop, False)]
)
def test_who_wrote_the_step_says_whether_it_is_adams(kind, is_one):
    assert is_adam(kind([torch.nn.Parameter(torch.ones(2))])) is is_one


# -------------------------------------------------------------------- moments that belong together


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6), size=st.sampled_from([1e-12, 1.0, 1e15]), noise=st.sampled_from([0, 1e-4, 1])
)
def test_a_variance_stays_one_in_other_coordinates(seed, size, noise):
    """Centred RMSprop takes the square of ``grad_avg`` from ``square_avg``, and then the root."""
    random = torch.Generator().manual_seed(seed)
    model, sites = two_pairs()
    base = RMSprop(tiny.trained(model), lr=1e-3, centered=True)
    optimizer = GritOptimizer(base, model, sites=sites, precondition="none")
    for p in tiny.trained(model):
        mean = size * torch.randn(p.shape, generator=random)
        square = mean.square() + noise * (size * torch.randn(p.shape, generator=random)).square()
        base.state[p].update(step=torch.tensor(3.0), grad_avg=mean, square_avg=square)
    for curvature in optimizer.curvature:
        rank, sites_here = curvature.bucket.rank, len(curvature.bucket.sites)
        turn = torch.randn(sites_here, rank, rank, generator=random, dtype=torch.float64)
        root = torch.randn(2, sites_here, rank, 1, generator=random)  # all but singular: of one token
        back = torch.linalg.inv(turn)
        move = transport.Move(turn, back, back.mT, turn.mT)
        transport.move_state(base, curvature.bucket.groups, move, tuple(root @ root.mT))
    for p in tiny.trained(model):
        mean, square = base.state[p]["grad_avg"], base.state[p]["square_avg"]
        assert square.isfinite().all()
        assert (square.addcmul(mean, mean, value=-1) >= 0).all()


def test_moments_keep_their_precision_and_stay_finite():
    model, sites = two_pairs()
    model.double()
    base = AdamW(tiny.trained(model), lr=1e-3)
    optimizer = GritOptimizer(base, model, sites=sites, precondition="none")
    advance(model, optimizer, 1)
    before = {p: base.state[p]["exp_avg"].clone() for p in tiny.trained(model)}
    for curvature in optimizer.curvature:
        eye = torch.eye(3).expand(len(curvature.bucket.sites), 3, 3)
        transport.move_state(base, curvature.bucket.groups, transport.Move(eye, eye, eye, eye))
        assert all(torch.equal(base.state[p]["exp_avg"], m) for p, m in before.items())
        for p in before:
            base.state[p] = {"exp_avg": torch.full(p.shape, 1e30), "exp_avg_sq": torch.full(p.shape, 1e38)}
        large = 1e10 * eye.double()
        transport.move_state(base, curvature.bucket.groups, transport.Move(large, large, large, large))
        assert all(t.isfinite().all() for p in before for t in base.state[p].values())


def test_an_entrywise_tensor_is_an_ordinary_one_in_the_parameters_shape():
    parameter = torch.ones(2, 3)
    ordinary = (torch.zeros(2, 3), torch.nn.Parameter(torch.zeros(2, 3)), torch.zeros(2, 3, dtype=torch.half))
    others = (torch.zeros(6), torch.zeros(2, 3).to_sparse(), torch.zeros(2, 3, dtype=torch.bool), None, 0.5)
    assert all(layout.is_entrywise(value, parameter) for value in ordinary)
    assert not any(layout.is_entrywise(value, parameter) for value in others)
