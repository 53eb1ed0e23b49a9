"""Only what reaches the gradients of a step reaches the factors, whatever other backward passes there are."""

import copy
import gc
import weakref

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from support import parts
from tiny import HandWritten
from torch import nn
from torch.utils.checkpoint import checkpoint

from grit_optim import GritOptimizer, Site
from grit_optim.capture import gathered

MODES = ("spectral", "steer", "eigenbasis", "balanced", "inverse")


class Net(nn.Module):
    """Two layers; the second is used twice in a forward pass."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = HandWritten(4, 5, rank=2), HandWritten(5, 5, rank=3)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        return self.second(torch.tanh(self.second(x)))


def built(mode="spectral", base=torch.optim.AdamW, **options):
    model = Net()
    layers = {"first": model.first, "second": model.second}
    sites = [Site.from_modules(name, m.down, m.up, m.scaling) for name, m in layers.items()]
    optimizer = GritOptimizer(
        base(trained(model), lr=1e-2),
        model,
        sites=sites,
        precondition=mode,
        **{"kfac_min_samples": 8, **options},
    )
    return model, optimizer


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def batch(seed):
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))


def loss_of(model, seed):
    return model(batch(seed)).square().mean()


# Each looks at gradients and leaves `.grad` as it found it (empty).


def cleared(clear):
    def look(model, seed):
        loss_of(model, seed).backward()
        clear(model)

    return look


def to_none(model):
    for p in trained(model):
        p.grad = None


def retained(model, seed):
    """Adaptive loss weights: a pass through the graph that is differentiated again."""
    loss = loss_of(model, seed)
    loss.backward(retain_graph=True)
    model.zero_grad()
    loss.backward()
    model.zero_grad()


def autograd_grad(model, seed):
    torch.autograd.grad(loss_of(model, seed), trained(model))


def grad_of_some(model, seed):
    torch.autograd.grad(loss_of(model, seed), [model.first.down.weight, model.second.up.weight])


def grad_of_input(model, seed):
    x = batch(seed).requires_grad_()
    torch.autograd.grad(model(x).sum(), x)


def double(model, seed):
    gradients = torch.autograd.grad(loss_of(model, seed), trained(model), create_graph=True)
    sum(g.square().sum() for g in gradients).backward()
    model.zero_grad()


def batched(model, seed):
    out = model(batch(seed))
    torch.autograd.grad(
        out, trained(model), torch.eye(out.numel()).view(-1, *out.shape), is_grads_batched=True
    )


def functional(transform):
    def look(model, seed):
        weights = {n: p.detach() for n, p in model.named_parameters()}

        def loss(w, x):
            return torch.func.functional_call(model, w, (x,)).square().mean()

        transform(loss)(weights, batch(seed))

    return look


def over_inputs(model, seed):
    torch.func.vmap(torch.func.grad(lambda x: model(x).square().sum()))(batch(seed))


def meta_learning(model, seed):
    """An inner loop on copies of the weights, whose gradients are their own."""
    weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    torch.func.functional_call(model, weights, (batch(seed),)).square().mean().backward()


def failing(model, seed):
    """A pass that stops half way, as out of memory does."""
    x = batch(seed).requires_grad_()
    x.register_hook(lambda g: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        model(x).sum().backward()
    model.zero_grad()


def without_backward(model, seed):
    loss_of(model, seed)
    with torch.no_grad():
        loss_of(model, seed)
    loss_of(model.eval(), seed)
    model.train()


LOOKS = {
    "model.zero_grad": cleared(nn.Module.zero_grad),
    "grad = None": cleared(to_none),
    "retain_graph": retained,
    "autograd.grad": autograd_grad,
    "grad of some": grad_of_some,
    "grad of input": grad_of_input,
    "double": double,
    "is_grads_batched": batched,
    "func.grad": functional(torch.func.grad),
    "jacrev": functional(torch.func.jacrev),
    "vmap": over_inputs,
    "meta-learning": meta_learning,
    "failing": failing,
    "without backward": without_backward,
}


def run(program, mode="spectral", limit=None, **options):
    """Weights and GRIT's state after a program of looks, by name, and of training passes (numbers)."""
    model, optimizer = built(mode, **options)
    for seed, item in enumerate(program):
        if item == "step":
            optimizer.step()
            optimizer.zero_grad()
        elif isinstance(item, int):
            loss_of(model, item).backward()
        else:
            LOOKS[item](model, 100 + seed)
    state = optimizer.state_dict()["grit"]
    return [p.detach() for p in trained(model)], state["sites"], state["calls_per_step"], state["offset"]


def assert_equal(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        [assert_equal(a[k], b[k]) for k in a]
    elif isinstance(a, list | tuple):
        [assert_equal(x, y) for x, y in zip(a, b, strict=True)]
    else:
        assert a == b


@settings(max_examples=12, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(
    steps=st.lists(
        st.tuples(st.lists(st.sampled_from(sorted(LOOKS)), max_size=3), st.integers(1, 3), st.booleans()),
        min_size=2,
        max_size=4,
    ),
    mode=st.sampled_from(MODES),
    max_tokens=st.sampled_from([None, 5]),
    limit=st.sampled_from([0, 60, gathered.PENDING_LIMIT]),
)
def test_looking_at_gradients_changes_no_bit_of_training(steps, mode, max_tokens, limit):
    """Looks come before the training passes of a step or, those that leave `.grad` alone, between them."""
    program, number = [], 0
    alone = [name for name in LOOKS if name not in ("model.zero_grad", "grad = None", "retain_graph")]
    alone = [name for name in alone if name not in ("double", "failing")]
    for looks, passes, between in steps:
        program += looks
        for _ in range(passes):
            program.append(number)
            number += 1
            program += [name for name in looks if between and name in alone]
        program.append("step")
    usual, gathered.PENDING_LIMIT = gathered.PENDING_LIMIT, limit
    try:
        plain = run([item for item in program if item not in LOOKS], mode, max_tokens=max_tokens)
        assert_equal(run(program, mode, max_tokens=max_tokens), plain)
    finally:
        gathered.PENDING_LIMIT = usual


ZEROED = {
    "model.zero_grad": lambda model: model.zero_grad(set_to_none=False),
    "zero_": lambda model: [p.grad.zero_() for p in trained(model)],
    "foreach": lambda model: torch._foreach_zero_([p.grad for p in trained(model)]),
    "new zeros": lambda model: [setattr(p, "grad", torch.zeros_like(p)) for p in trained(model)],
}


@pytest.mark.parametrize("then", ["train", "step"])
@pytest.mark.parametrize("way", ZEROED)
def test_gradients_that_are_zeroed_in_place_are_cleared_too(way, then):
    ends = []
    for look in (True, False):
        model, optimizer = built()
        loss_of(model, 0).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        if look:
            loss_of(model, 9).backward()
            ZEROED[way](model)
        if then == "train":
            loss_of(model, 1).backward()
        optimizer.step()
        ends.append([*trained(model), optimizer.state_dict()["grit"]["sites"]])
    assert_equal(*ends)


def in_place(model):
    torch.nn.utils.clip_grad_norm_(trained(model), 1e-3)


def new_tensors(model):
    for p in trained(model):
        p.grad = p.grad * 0.5


@pytest.mark.parametrize("change", [in_place, new_tensors])
def test_gradients_that_are_changed_are_not_cleared(change):
    model, optimizer = built()
    for seed in (0, 1):
        loss_of(model, seed).backward()
        change(model)
    assert [report.fired for report in optimizer.check_capture()] == [2, 4]
    optimizer.step()
    assert optimizer.telemetry()["samples"] == {"first": 12, "second": 24}


def test_gradients_that_a_wrapper_takes_away_in_the_pass_and_brings_back_count():
    """As sharded training does: `.grad` is empty between passes, and their sum is set before the step."""
    model, optimizer = built()
    main = {}

    def take(p):
        main[p] = main.get(p, 0) + p.grad
        p.grad = None

    for p in trained(model):
        p.register_post_accumulate_grad_hook(take)
    for seed in range(3):
        loss_of(model, seed).backward()
    for p, gradient in main.items():
        p.grad = gradient
    optimizer.step()
    assert optimizer.telemetry()["samples"] == {"first": 18, "second": 36}


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_passes_that_are_cleared_do_not_count(reentrant):
    ends = []
    for look in (True, False):
        model, optimizer = built()

        def passed(seed, model=model):
            x = batch(seed).requires_grad_()
            x = checkpoint(model.first, x, use_reentrant=reentrant)
            checkpoint(model.second, torch.tanh(x), use_reentrant=reentrant).square().mean().backward()

        for seed in range(4):
            if look:
                passed(50 + seed)
                model.zero_grad()
            passed(seed)
            passed(10 + seed)
            optimizer.step()
            optimizer.zero_grad()
        ends.append([*trained(model), optimizer.state_dict()["grit"]["sites"]])
    assert optimizer.telemetry()["samples"] == {"first": 48, "second": 48}
    assert_equal(*ends)


@pytest.mark.parametrize("half", ["down", "up"])
def test_a_pair_of_which_one_half_is_frozen_later_is_seen_by_the_other(half):
    model, optimizer = built()
    for seed in range(2):
        getattr(model.second, half).requires_grad_(seed == 0)
        loss_of(model, seed).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.telemetry()["samples"] == {"first": 12, "second": 24}


def test_nothing_of_a_pass_that_does_not_count_stays_in_memory():
    model, optimizer = built()
    kept = []
    handle = model.first.down.register_forward_hook(lambda m, a, out: kept.append(weakref.ref(out)))
    for name, look in LOOKS.items():
        if name not in ("model.zero_grad", "grad = None", "retain_graph", "double", "failing"):
            look(model, 1)
    handle.remove()
    gc.collect()
    assert parts(optimizer).capture.waiting == [0, 0]
    assert not any(ref() is not None for ref in kept)


def test_no_hook_is_left_on_the_weights():
    model, optimizer = built()

    def hooked():
        return [p for p in trained(model) if p._backward_hooks or p._post_accumulate_grad_hooks]

    assert len(hooked()) == 4
    copied = copy.deepcopy(model)
    assert not any(p._backward_hooks for p in trained(copied))
    optimizer.close()
    assert hooked() == []
    model, optimizer = built()
    del optimizer
    gc.collect()
    assert hooked() == []
