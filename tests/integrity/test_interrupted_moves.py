"""A step, a reduction or a cut that fails at any operation leaves the adapter before it or after it."""

import copy
import warnings

import layered
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class OutOfMemory(BaseException):
    """Not an Exception, as Ctrl-C is not."""


class FailAt(TorchDispatchMode):
    """Lets the k-th operation fail, counted from 0; notes which come after many were written."""

    def __init__(self, k):
        super().__init__()
        self.k, self.seen, self.after_writes = k, 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        if self.seen == self.k + 1:
            raise OutOfMemory(str(func))
        if "foreach_copy" in func.name():  # how weights and moments are moved
            self.after_writes.append(self.seen)
        return func(*args, **(kwargs or {}))


MOVING = {"reprojection": "balanced", "reprojection_freq": 4, "rank_budget": 0.6}
MOVING |= {"min_lora_rank": 0, "reprojection_warmup_steps": 4}
STEPS = {
    "balanced": {"precondition": "balanced", "kfac_update_freq": 1},
    "eigenbasis": {"precondition": "eigenbasis", "kfac_update_freq": 1},
    "ekfac": {"precondition": "steer", "fisher": "ekfac"},
    "spectral": {"precondition": "spectral", **MOVING},
    "eigenbasis, reprojecting": {"precondition": "eigenbasis", **MOVING},
    "regrowing": {"precondition": "steer", **MOVING, "rank_budget": (0.3, 0.9), "rank_budget_steps": 8},
    "paper": {
        "precondition": "inverse",
        "reprojection": "two_sided",
        "reprojection_k": 2,
        "reprojection_freq": 4,
        "reprojection_warmup_steps": 4,
    },
}
ANYWHERE, AFTER_WRITES = 3, 7


def ready(options):
    """A model whose next step is the fifth, which reprojects."""
    model = layered.model(d_in=7)
    optimizer = layered.grit(model, **options)
    layered.train(model, optimizer, 4)
    optimizer.zero_grad()
    return model, optimizer


def fork(model, optimizer):
    """A copy with the gradients of the fifth step."""
    model, optimizer = copy.deepcopy([model, optimizer])
    layered.loss_of(model, 4).backward()
    return model, optimizer


def places(run):
    """Some of the places where it can fail: anywhere, the first and the last among them, and after writes."""
    with FailAt(-1) as counter:
        run()
    last, writes = counter.seen - 1, [k for k in counter.after_writes if k < counter.seen]
    spread = {round(i * last / (ANYWHERE - 1)) for i in range(ANYWHERE)}
    return sorted(spread | {writes[round(i * (len(writes) - 1) / AFTER_WRITES)] for i in range(AFTER_WRITES)})


def watched(optimizer):
    """Tells how far the base has got with its step."""
    base, told = optimizer.base, {"stage": "before"}
    step = base.step

    def watch(*args):
        told["stage"] = "within"
        step(*args)
        told["stage"] = "after"

    base.step = watch
    return told


@pytest.mark.parametrize("options", STEPS.values(), ids=STEPS.keys())
@pytest.mark.filterwarnings("ignore")
def test_a_step_that_fails_anywhere_leaves_one_system_of_coordinates(options):
    """The answers are those before, after the base's step, or after all; within it, that is the base's."""
    model, optimizer = ready(options)
    without_model, without = fork(*ready({**options, "reprojection_freq": 1000}))
    without.step()
    whole_model, whole = fork(model, optimizer)
    known = places(whole.step)
    answers = [layered.answer(one) for one in (model, whole_model, without_model)]
    layered.train(whole_model, whole, 2, first=5)
    later = layered.answer(whole_model)
    size = float((answers[1] - answers[0]).abs().max())
    moved = 0
    for k in known:
        twin, other = fork(model, optimizer)
        told = watched(other)
        with pytest.raises(OutOfMemory), FailAt(k):
            other.step()
        now = layered.answer(twin)
        allowed = answers[:1] if told["stage"] == "before" else answers
        if told["stage"] != "within" or options["precondition"] not in ("balanced", "inverse"):
            assert min(float((now - one).abs().max()) for one in allowed) < 2e-5, (k, told)
        moved += told["stage"] == "after"
        layered.train(twin, other, 2, first=5)
        assert (layered.answer(twin) - later).abs().max() < 3 * size + 1e-3, (k, told)
    assert moved > 0 or "reprojection" not in options


def everything(model, optimizer):
    """All that a move may change, as plain values of its own."""
    return copy.deepcopy(
        {
            "weights": layered.weights(model),
            "gradients": [p.grad for p in layered.trained(model)],
            "state": optimizer.state_dict(),
            "sizes": [
                (m.out_features, m.in_features) for m in model.modules() if isinstance(m, torch.nn.Linear)
            ],
            "config": model.peft_config["default"].to_dict(),
        }
    )


NOTHING_TO_MOVE = {("balanced", "close"), ("spectral", "close")}


@pytest.mark.parametrize("mode", ["balanced", "eigenbasis", "spectral"])
@pytest.mark.parametrize("what", ["reduce_ranks_", "shrink_", "close"])
@pytest.mark.filterwarnings("ignore")
def test_a_move_that_fails_anywhere_has_changed_nothing(mode, what):
    options = {"precondition": mode, "min_lora_rank": 0, "kfac_update_freq": 1}
    model, optimizer = ready(options)
    if what == "shrink_":
        optimizer.reduce_ranks_(0.5)

    def run(m, o):
        if what == "reduce_ranks_":
            o.reduce_ranks_(0.5)
        elif what == "shrink_":
            o.shrink_(model=m)
        else:
            o.close()

    after_model, after = fork(model, optimizer)
    known = places(lambda: run(after_model, after))
    whole = everything(after_model, after)
    undone = 0
    for k in known:
        twin, other = fork(model, optimizer)
        before = everything(twin, other)
        with pytest.raises(OutOfMemory), FailAt(k):
            run(twin, other)
        now = everything(twin, other)
        if layered.same(now, before):
            undone += 1
            run(twin, other)  # nothing stands in the way of another try
            assert layered.same(everything(twin, other), whole), k
        else:  # the report that follows is what failed
            assert layered.same(now, whole), k
        if what != "close":
            layered.train(twin, other, 2, first=5)
            assert layered.answer(twin).isfinite().all()
    assert undone > 1 or (mode, what) in NOTHING_TO_MOVE


class FailingStep(torch.optim.AdamW):
    """Fails once all parameters but the last have been stepped."""

    fails = False

    @torch.no_grad()
    def step(self, closure=None):
        if self.fails:
            for p in self.param_groups[0]["params"][:-1]:
                p.sub_(0.01 * p.grad.sign())
            raise KeyboardInterrupt
        return super().step(closure)


@pytest.mark.parametrize("mode", ["spectral", "steer", "eigenbasis"])
def test_a_base_that_is_interrupted_leaves_the_pairs_as_they_were(mode):
    model, optimizer = layered.model(), None
    optimizer = layered.grit(model, base=FailingStep, precondition=mode)
    layered.train(model, optimizer, 3)
    layered.loss_of(model, 3).backward()
    before = layered.weights(model)
    optimizer.base.fails = True
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert layered.same(layered.weights(model), before)


def test_taps_and_sites_stay_when_a_change_of_the_model_fails():
    """A pair that was frozen is taken in. Wherever that fails, the others are known as before."""
    model = layered.model()
    late = list(model.base_model.model.third.lora_A.parameters()) + list(
        model.base_model.model.third.lora_B.parameters()
    )
    everything = layered.trained(model)
    for p in late:
        p.requires_grad_(False)
    optimizer = layered.GritOptimizer(torch.optim.AdamW(everything, lr=1e-2), model, kfac_min_samples=4)
    layered.train(model, optimizer, 3)
    for p in late:
        p.requires_grad_(True)
    state = copy.deepcopy(optimizer.state_dict())
    for k in range(0, 12, 3):
        optimizer.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(OutOfMemory), FailAt(k):
                optimizer.step()  # no backward pass: all that it does is to take the pair in
        assert layered.same(optimizer.state_dict()["grit"], state["grit"]), k
    layered.train(model, optimizer, 3, first=3)
    told = optimizer.telemetry()["samples"]
    assert len(told) == 3
    assert sorted(told.values())[-1] == 72
