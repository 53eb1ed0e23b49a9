"""All 128 of pytorch_optimizer as bases: they step, resume, lose ranks, shrink, or are refused by name."""

import copy
import warnings

import pytest
import torch
from tiny import HandWritten, trained
from torch import nn

from grit_optim import GritOptimizer, Site

peers = pytest.importorskip("pytorch_optimizer")

# State that is a list, a dict, an object, factored, flat, scalar, a mask; counted per group; made in step 1.
SOME = ("adamw", "soap", "aggmo", "kron", "conda", "adashift", "spam", "sara", "amos", "padam", "lorarite")
REFUSED = {"adalomo", "alig", "bsam", "demo", "lbfgs", "lomo", "sara"}
OF_SEVERAL_PROCESSES = {"distributedmuon"}  # cannot be built in one
DIFFERENTIATED_AGAIN = {"adahessian", "sophiah"}  # they take the gradient of the gradient


def two_pairs(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(HandWritten(), HandWritten(5, 7))


def base_of(name, model):
    """The optimizer, built as its class wants it."""
    kind, parameters = peers.load_optimizer(name), trained(model)
    rate, problem = {"lr": 1e-2}, None
    for first, settings in (
        (parameters, rate),
        (parameters, {**rate, "num_iterations": 10}),
        ([{"params": parameters, "use_muon": True}], rate),
        (model, rate),
        (parameters, {**rate, "num_data": 10}),
        (parameters, {"max_lr": 1e-2}),
    ):
        try:
            return kind(first, **settings)
        except Exception as error:  # each class has its own
            problem = error
    raise problem


def wrapped(name, model):
    pairs = [Site.from_modules(str(i), pair.down, pair.up, pair.scaling) for i, pair in enumerate(model)]
    often = {"reprojection": "balanced", "reprojection_freq": 2, "reprojection_k": 2, "kfac_min_samples": 8}
    return GritOptimizer(base_of(name, model), model, sites=pairs, **often)


def advance(name, model, optimizer, first, last):
    for step in range(first, last):
        torch.manual_seed(step)
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward(create_graph=name in DIFFERENTIATED_AGAIN)
        optimizer.step()


def resumed(make, name, model, optimizer):
    """Whether a copy that loads the state goes on as the optimizer itself does."""
    other = two_pairs(1)
    other.load_state_dict(model.state_dict())
    copied = make(name, other)
    copied.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, its in ((model, optimizer), (other, copied)):
        advance(name, one, its, 3, 4)
    return all(torch.equal(p, q) for p, q in zip(trained(model), trained(other), strict=True))


def check(name):
    model = two_pairs()
    if name in REFUSED:
        kind = peers.load_optimizer(name).__name__
        with pytest.raises(TypeError, match=kind):
            wrapped(name, model)
        return
    optimizer = wrapped(name, model)
    advance(name, model, optimizer, 0, 3)
    assert set(optimizer.ranks().values()) == {2}
    if not resumed(wrapped, name, model, optimizer):
        plain_model = two_pairs()
        plain = base_of(name, plain_model)
        advance(name, plain_model, plain, 0, 3)
        assert not resumed(base_of, name, plain_model, plain), "the base itself resumes exactly"
    optimizer.shrink_()
    advance(name, model, optimizer, 4, 6)
    assert {tuple(p.shape) for p in trained(model)} == {(2, 6), (2, 5), (5, 2), (7, 2)}
    assert all(p.isfinite().all() for p in trained(model))


@pytest.mark.parametrize("name", SOME)
@pytest.mark.filterwarnings("ignore")
def test_a_base_of_each_kind_of_state(name):
    check(name)


@pytest.mark.slow
def test_every_base():
    names = set(peers.get_supported_optimizers()) - OF_SEVERAL_PROCESSES
    assert len(names) > 100
    failed = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in sorted(names):
            try:
                check(name)
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {error}"
    assert failed == {}
