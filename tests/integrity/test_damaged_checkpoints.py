"""A damaged checkpoint is refused and changes nothing, or it loads and training goes on."""

import copy
import random
import warnings

import layered
import pytest
import torch

MODES = ["spectral", "steer", "eigenbasis", "balanced", "inverse", "none"]
SETTINGS = {
    **{mode: {"precondition": mode} for mode in MODES},
    "seldom": {"precondition": "steer", "kfac_update_freq": 3},
    "ekfac": {"precondition": "inverse", "fisher": "ekfac"},
    "block_diagonal": {"precondition": "spectral", "fisher": "block_diagonal"},
    "budget": {"reprojection": "balanced", "reprojection_freq": 2, "rank_budget": 0.7, "min_lora_rank": 0},
    "adaptive": {
        "adaptive_schedule": True,
        "rank_budget_schedule": "adaptive",
        "rank_budget_steps": 6,
        "reprojection": "balanced",
        "reprojection_freq": 2,
        "rank_budget": 0.7,
        "min_lora_rank": 0,
    },
    "penalties": {"lambda_kfac": 0.1, "kfac_update_freq": 2},
}
DAMAGES_EACH = 24


def entries(node):
    """Every (container, key) of a nested state."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        yield node, key
        yield from entries(child)


def damaged_tensor(value, choose):
    floating = value.is_floating_point()
    return choose(
        [
            torch.full_like(value, float("nan")) if floating else value.double(),
            torch.full_like(value, float("inf")) if floating else value.bool(),
            value.flatten()[:-1].clone(),
            torch.zeros(*value.shape, 2, dtype=value.dtype),
            value.T.clone()[..., :-1] if value.dim() == 2 else value[None].clone(),
            value.to(torch.int32),
            value.to(torch.complex64),
            value.tolist(),
            -value.float().abs() - 1,
            None,
        ]
    )


def damage(state, seed):
    """Damage one entry at a random depth; says what was done."""
    chance = random.Random(seed)
    container, key = chance.choice(list(entries(state)))
    kind = chance.choice(["delete", "rename", "change", "change", "change"])
    value = container[key]
    if kind == "delete":
        del container[key]
    elif kind == "rename" and isinstance(container, dict):
        container[f"{key}_" if isinstance(key, str) else 10**6] = container.pop(key)
    elif isinstance(value, torch.Tensor):
        container[key] = damaged_tensor(value, chance.choice)
    elif isinstance(value, list):
        container[key] = chance.choice([value[:-1], [*value, value[-1] if value else 0], None, {}])
    elif isinstance(value, bool) or value is None or isinstance(value, str):
        container[key] = chance.choice(["?", [], torch.ones(2), float("nan")])
    elif isinstance(value, int | float):
        container[key] = chance.choice([-3, float("nan"), "?", None, [value], torch.ones(2), 10**40])
    else:
        container[key] = chance.choice([None, [], "?", 0, {"?": 0}])
    return (
        f"{kind} {key!r}: {value!r:.80} -> {container.get(key) if isinstance(container, dict) else ''!r:.80}"
    )


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS.keys())
def test_a_damaged_checkpoint_is_refused_whole_or_loaded_whole(options):
    model = layered.model()
    optimizer = layered.grit(model, **options)
    layered.train(model, optimizer, 3)
    intact = copy.deepcopy(optimizer.state_dict())
    layered.train(model, optimizer, 2, first=3)
    before, weights = copy.deepcopy(optimizer.state_dict()), layered.weights(model)
    refused = 0
    for seed in range(DAMAGES_EACH):
        state = copy.deepcopy(intact)
        what = damage(state, seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                optimizer.load_state_dict(state)
            except Exception:
                refused += 1
                assert layered.same(optimizer.state_dict(), before), what
                continue
            layered.train(model, optimizer, 2, first=5)
        finite = all(w.isfinite().all() for w in layered.weights(model).values())
        assert finite, f"loaded, and then the weights were not finite: {what}"
        model.load_state_dict(weights, strict=False)
        optimizer.load_state_dict(copy.deepcopy(before))
        assert layered.same(optimizer.state_dict(), before), what
    assert 0.4 * DAMAGES_EACH < refused < DAMAGES_EACH


def grit_part(key, value):
    def spoil(state):
        site = next(iter(state["grit"]["sites"].values()))
        site[key] = value(site[key]) if callable(value) else value

    return spoil


NAMED = {
    "NaN in a factor": (grit_part("gradient", lambda t: t * torch.nan), r"\['gradient'\] holds NaN"),
    "infinity in an operator": (
        grit_part("a_operator", lambda t: t / 0),
        r"\['a_operator'\] holds NaN or inf",
    ),
    "a rank too high": (grit_part("rank", torch.tensor(9)), r"\['rank'\] holds 9, which is not from 0 to 3"),
    "negative samples": (grit_part("gradient_samples", torch.tensor(-1.0)), "holds -1"),
    "no covariance": (grit_part("activation", torch.eye(3).cumsum(0)), "not symmetric"),
    "a list": (grit_part("activation", [1.0]), "is a list, not a tensor"),
    "a missing entry": (lambda s: s["grit"].pop("steps"), "grit lacks 'steps'"),
    "a renamed entry": (lambda s: s["grit"].update(stepz=s["grit"].pop("steps")), "but has 'stepz'"),
    "an unknown mode": (lambda s: s["grit"].update(precondition="?"), "none of spectral"),
    "a moment that is NaN": (
        lambda s: s["state"][1]["exp_avg"].fill_(torch.nan),
        "parameter 1 of group 0: exp_avg",
    ),
    "a moment of another shape": (lambda s: s["state"][1].update(exp_avg=torch.ones(2)), r"has shape \[2\]"),
    "no rate": (lambda s: s["param_groups"][0].pop("lr"), "lacks 'lr', which AdamW needs"),
    "a rate that is NaN": (lambda s: s["param_groups"][0].update(lr=torch.nan), r"\['lr'\] is NaN"),
    "one β of two": (lambda s: s["param_groups"][0].update(betas=(0.9,)), r"\['betas'\] is \(0.9,\)"),
    "a negative average of squares": (
        lambda s: s["state"][1]["exp_avg_sq"].neg_(),
        "parameter 1 of group 0: exp_avg_sq holds a negative",
    ),
    "averages in each other's place": (
        lambda s: s["state"][1].update(exp_avg_sq=s["state"][1]["exp_avg"]),
        "exp_avg_sq holds a negative",
    ),
    "a step that is infinite": (
        lambda s: s["state"][1].update(step=torch.tensor(torch.inf)),
        "step is tensor\\(inf\\), not a count",
    ),
    "entries that share their memory": (
        lambda s: s["state"][1].update(exp_avg=s["state"][1]["exp_avg"][:1].expand(8, -1)),
        "share their memory",
    ),
    "a rate beyond all floats": (lambda s: s["param_groups"][0].update(eps=10**400), "too large"),
    "a pace beyond all floats": (lambda s: s["grit"]["pace"].update(period_scale=10**400), "too large"),
    "a sparse factor": (grit_part("activation", lambda t: t.to_sparse()), "is stored as torch.sparse_coo"),
    "eigenvectors that are none": (grit_part("a_operator", lambda t: t * 1e6), "is not orthogonal"),
    "not a dict at all": (lambda s: s.update(grit=[1]), "grit is a list, not a dict"),
}


@pytest.mark.parametrize(("spoil", "message"), NAMED.values(), ids=NAMED.keys())
def test_what_is_damaged_is_named(spoil, message):
    model = layered.model()
    optimizer = layered.grit(model, precondition="eigenbasis")
    layered.train(model, optimizer, 3)
    state = copy.deepcopy(optimizer.state_dict())
    spoil(state)
    layered.train(model, optimizer, 1, first=3)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert layered.same(optimizer.state_dict(), before)


class Halfway(torch.optim.AdamW):
    """Writes into its present state while it loads, and fails in the middle."""

    def load_state_dict(self, state_dict):
        for state in self.state.values():
            state["exp_avg"].zero_()
        self.param_groups[0]["lr"] = 5.0
        self.loaded = True
        self.state.popitem()
        raise self.failure


@pytest.mark.parametrize("failure", [RuntimeError("no"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_a_base_that_fails_in_the_middle_of_loading_is_put_back(failure):
    model = layered.model()
    optimizer = layered.grit(model, base=Halfway, precondition="eigenbasis")
    optimizer.base.failure = failure
    layered.train(model, optimizer, 3)
    before, moments = copy.deepcopy(optimizer.state_dict()), list(optimizer.state.values())
    with pytest.raises(type(failure)):
        optimizer.load_state_dict(optimizer.state_dict())
    assert layered.same(optimizer.state_dict(), before)
    assert not hasattr(optimizer.base, "loaded")
    assert all(a is b for a, b in zip(optimizer.state.values(), moments, strict=True))


def test_a_refusal_leaves_what_waits_for_the_next_step():
    model, twin = layered.model(), layered.model()
    optimizer, other = layered.grit(model), layered.grit(twin)
    state = copy.deepcopy(optimizer.state_dict())
    state["state"] = None
    for m in (model, twin):
        layered.loss_of(m).backward()
    with pytest.raises(Exception, match="None"):
        optimizer.load_state_dict(state)
    for m, o in ((model, optimizer), (twin, other)):
        o.step()
        layered.train(m, o, 2, first=1)
    assert layered.same(layered.weights(model), layered.weights(twin))


@pytest.mark.filterwarnings("ignore")
def test_an_older_checkpoint_without_later_entries_loads():
    model = layered.model()
    optimizer = layered.grit(model)
    layered.train(model, optimizer, 3)
    state = copy.deepcopy(optimizer.state_dict())
    for name in ("pace", "reprojection", "origin", "removed", "budget", "fisher"):
        del state["grit"][name]
    for site in state["grit"]["sites"].values():
        del site["price"], site["dropped"]
    optimizer.load_state_dict(state)
    layered.train(model, optimizer, 1)
