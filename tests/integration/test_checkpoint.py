"""Saving and loading: one key, plain fp32 contents, and a resumed run goes on as if it had never stopped."""

import copy

import pytest
import support
import torch
from golden.cases import SHORT_PAPER as PAPER
from tiny import adamw, grit, llama, train, trained, weights
from torch.optim import AdamW

from grit_optim import GritOptimizer, presets

MODES = ["spectral", "steer", "inverse", "eigenbasis", "balanced", "none"]

ADAPTING = {
    "reprojection": "balanced",
    "reprojection_freq": 3,
    "rank_adaptation_threshold": 0.9,
    "min_lora_rank": 1,
}
RUNS = {
    **{f"{mode}-every-step": {"precondition": mode, "kfac_update_freq": 1} for mode in MODES},
    **{
        f"{mode}-throttled": {"precondition": mode, "kfac_update_freq": 3, "cov_update_freq": 2}
        for mode in MODES
    },
    **{f"{mode}-adapting": {"precondition": mode, "kfac_update_freq": 2, **ADAPTING} for mode in MODES},
    "subsampled": {"max_tokens": 7},
    "running-mean": {"fisher_decay": None},
    "paper": PAPER,
    "penalties": {
        "kfac_update_freq": 3,
        "lambda_kfac": 0.1,
        "lambda_reproj": 0.1,
        "reprojection_k": 2,
        "regularizer_warmup_steps": 8,
    },
    **{
        f"{fisher}-{frequency}": {"precondition": mode, "fisher": fisher, "kfac_update_freq": frequency}
        for fisher, mode in (("diagonal", "inverse"), ("block_diagonal", "spectral"), ("ekfac", "steer"))
        for frequency in (1, 3)
    },
    "paper-as-shipped": dict(presets.PAPER),
}


def built(options, seed=0, **lora):
    model = llama(seed=seed, **lora)
    return model, GritOptimizer(adamw(model, weight_decay=0.1), model, **{"kfac_min_samples": 8, **options})


def saved(path, *parts):
    """Through a file, as safe loading reads it."""
    torch.save([part.state_dict() for part in parts], path)
    return torch.load(path, weights_only=True)


def assert_equal(left, right):
    assert left.keys() == right.keys()
    assert len(left) == 28
    for name in left:
        assert torch.equal(left[name], right[name]), name


# -------------------------------------------------------------------- resume


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS.keys())
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, options):
    model, optimizer = built(options)
    train(model, optimizer, 5)
    states = saved(tmp_path / "run.pt", model, optimizer)
    losses = train(model, optimizer, 6, first=5)
    fresh_model, fresh = built(options, seed=1)
    fresh_model.load_state_dict(states[0])
    fresh.load_state_dict(states[1])
    assert train(fresh_model, fresh, 6, first=5) == losses
    assert_equal(weights(fresh_model), weights(model))
    ours, theirs = optimizer.telemetry(), fresh.telemetry()
    same = ("steps", "refreshes", "reprojections", "engaged_sites", "samples", "ranks")
    assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}


@pytest.mark.parametrize(
    "name", [name for name in RUNS if name != "paper-as-shipped" and not name.startswith("none")]
)
def test_those_runs_do_use_the_curvature(name):
    """Guards the test above: resuming something that never engaged would prove nothing."""
    model, optimizer = built(RUNS[name])
    train(model, optimizer, 5)
    told = optimizer.telemetry()
    assert told["engaged_sites"] == 14 or RUNS[name].get("precondition") == "balanced"
    assert told["refreshes"] >= 2
    if "reprojection" in RUNS[name]:
        assert told["reprojections"] == 2
        assert min(told["ranks"].values()) < 4


# -------------------------------------------------------------------- what is saved


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        return [value]
    children = (
        value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    )
    return [tensor for child in children for tensor in tensors_in(child)]


@pytest.mark.parametrize("options", [RUNS["steer-every-step"], RUNS["eigenbasis-throttled"], PAPER], ids=str)
def test_one_key_beside_the_bases_own(options):
    model, optimizer = built(options)
    train(model, optimizer, 4)
    state = optimizer.state_dict()
    assert state.keys() == {*optimizer.base.state_dict(), "grit"}
    assert len(optimizer.base.state) == 28
    assert all(s.keys() == {"step", "exp_avg", "exp_avg_sq"} for s in optimizer.base.state.values())
    assert "grit" not in optimizer.base.state_dict()


def test_own_state_is_fp32_under_bf16_weights(tmp_path):
    model = llama().to(torch.bfloat16)
    optimizer = grit(model, precondition="eigenbasis", kfac_update_freq=2)
    train(model, optimizer, 4)
    states = saved(tmp_path / "bf16.pt", model, optimizer)
    fresh_model = llama(seed=1).to(torch.bfloat16)
    fresh = grit(fresh_model, precondition="eigenbasis", kfac_update_freq=2)
    fresh_model.load_state_dict(states[0])
    fresh.load_state_dict(states[1])
    own, reloaded = states[1]["grit"]["sites"], fresh.state_dict()["grit"]["sites"]
    assert {str(t.dtype) for t in tensors_in(own)} == {"torch.float32", "torch.int64", "torch.bool"}
    for name, site in own.items():
        floating = [key for key, value in site.items() if value.is_floating_point()]
        assert len(floating) == 11
        assert all(torch.equal(site[key], reloaded[name][key]) for key in floating)
    train(model, optimizer, 2, first=4)
    train(fresh_model, fresh, 2, first=4)
    assert_equal(weights(model), weights(fresh_model))


@pytest.mark.parametrize("mode", ["steer", "eigenbasis"])
def test_saved_tensors_own_small_storages(tmp_path, mode):
    """A row of a stack would bring the whole stack into the file, once per site."""
    model, optimizer = built({"precondition": mode})
    train(model, optimizer, 3)
    own = optimizer.state_dict()["grit"]
    found = tensors_in(own)
    per_site = 14 if mode == "eigenbasis" else 10
    assert len(found) == 14 * per_site
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in found)
    assert len({t.untyped_storage().data_ptr() for t in found}) == len(found)
    torch.save({k: v for k, v in own.items() if k != "sites"}, tmp_path / "rest.pt")
    assert (tmp_path / "rest.pt").stat().st_size < 4096


def test_saved_state_does_not_change_with_the_run():
    model, optimizer = built({"precondition": "steer"})
    train(model, optimizer, 3)
    own = optimizer.state_dict()["grit"]
    before = copy.deepcopy(own)
    train(model, optimizer, 3, first=3)
    assert own["steps"] == before["steps"] == 3
    pairs = list(zip(tensors_in(own), tensors_in(before), strict=True))
    assert len(pairs) == 14 * 10
    assert all(torch.equal(a, b) for a, b in pairs)


# -------------------------------------------------------------------- plain AdamW, there and back


def test_plain_checkpoint_loads(tmp_path):
    """Into a GritOptimizer that has a past of its own, which must not survive."""
    plain_model = llama()
    plain = adamw(plain_model)
    train(plain_model, plain, 3)
    states = saved(tmp_path / "plain.pt", plain_model, plain)
    model, optimizer = built({"precondition": "none"}, seed=1)
    train(model, optimizer, 2)
    model.load_state_dict(states[0])
    optimizer.load_state_dict(states[1])
    told = optimizer.telemetry()
    assert told["steps"] == 0
    assert set(told["samples"].values()) == {0}
    assert train(model, optimizer, 3, first=3) == train(plain_model, plain, 3, first=3)
    assert_equal(weights(model), weights(plain_model))


def test_our_checkpoint_loads_into_the_plain_base(tmp_path):
    model, optimizer = built({"precondition": "none"})
    train(model, optimizer, 3)
    states = saved(tmp_path / "ours.pt", model, optimizer)
    plain_model = llama(seed=1)
    plain = adamw(plain_model, lr=0.5)
    plain_model.load_state_dict(states[0])
    plain.load_state_dict(states[1])
    assert plain.param_groups[0]["lr"] == 1e-2
    assert train(plain_model, plain, 3, first=3) == train(model, optimizer, 3, first=3)
    assert_equal(weights(plain_model), weights(model))


# -------------------------------------------------------------------- another way to use the curvature


@pytest.mark.parametrize("frequency", [1, 2], ids=["every-step", "throttled"])
@pytest.mark.parametrize("mode", ["steer", "inverse", "balanced", "none"])
def test_moments_of_an_eigenbasis_checkpoint_come_back_to_plain_coordinates(tmp_path, mode, frequency):
    """The base holds Qᵀ m_A and m_B Q in the eigenbasis; turned back, they are what the other mode holds."""
    model, optimizer = built({"precondition": "eigenbasis", "kfac_update_freq": frequency})
    train(model, optimizer, 4)
    turned = {}
    for curvature in optimizer.curvature:
        for i, site in enumerate(curvature.bucket.sites):
            m_a, m_b = (optimizer.base.state[p]["exp_avg"] for p in (site.a, site.b))
            turned[site.name] = curvature.a_operator[i] @ m_a, m_b @ curvature.b_operator[i].T
            assert not torch.allclose(turned[site.name][0], m_a, rtol=1e-2)
    _, fresh = built({"precondition": mode})
    fresh.load_state_dict(saved(tmp_path / "turned.pt", optimizer)[0])
    assert len(turned) == 14
    for site in support.sites(fresh):
        for p, expected in zip((site.a, site.b), turned[site.name], strict=True):
            got = fresh.base.state[p]["exp_avg"]
            assert torch.allclose(got, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


def test_plain_checkpoint_loads_into_a_turned_base(tmp_path):
    """The moments that arrive are in plain coordinates, whatever the base's were before."""
    plain_model = llama()
    plain = adamw(plain_model)
    train(plain_model, plain, 3)
    model, optimizer = built({"precondition": "eigenbasis", "kfac_update_freq": 1})
    train(model, optimizer, 3)
    optimizer.load_state_dict(saved(tmp_path / "plain.pt", plain)[0])
    pairs = list(zip(trained(model), trained(plain_model), strict=True))
    assert len(pairs) == 28
    assert all(torch.equal(optimizer.base.state[p]["exp_avg"], plain.state[q]["exp_avg"]) for p, q in pairs)
    assert all(torch.equal(c.a_operator, torch.eye(4).expand(14, 4, 4)) for c in optimizer.curvature)


# -------------------------------------------------------------------- what does not belong here


def other_sites(own):
    own["sites"]["elsewhere.q_proj.default"] = own["sites"].pop(next(iter(own["sites"])))


def other_rank(own):
    site = next(iter(own["sites"].values()))
    site.update({key: torch.zeros(9, 9) for key in ("activation", "gradient")})


def newer_version(own):
    own["version"] = 99


FIRST_SITE = r"layers\.0\.self_attn\.q_proj\.default"
REFUSED = {
    "missing site": (other_sites, rf"1 \(.*{FIRST_SITE}\) of this model"),
    "strange site": (other_sites, r"1 \(elsewhere\.q_proj\.default\) of the checkpoint"),
    "rank": (other_rank, rf"{FIRST_SITE}' has rank 4, in the checkpoint 9"),
    "version": (newer_version, "version 99.*upgrade"),
}


@pytest.mark.parametrize(("spoil", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_checkpoint_that_does_not_belong_changes_nothing(spoil, message):
    model, optimizer = built({"precondition": "steer"})
    train(model, optimizer, 3)
    foreign = copy.deepcopy(optimizer.state_dict())
    spoil(foreign["grit"])
    train(model, optimizer, 2, first=3)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(foreign)
    after = optimizer.state_dict()
    pairs = list(zip(tensors_in(before), tensors_in(after), strict=True))
    assert len(pairs) == 14 * 10 + 3 * 28
    assert all(torch.equal(a, b) for a, b in pairs)
    assert after["grit"]["steps"] == 5


def test_a_real_adapter_of_another_rank_is_named():
    model, optimizer = built({}, r=6, lora_alpha=6)
    train(model, optimizer, 2)
    _, other = built({})
    with pytest.raises(ValueError, match=f"{FIRST_SITE}' has rank 4, in the checkpoint 6"):
        other.load_state_dict(optimizer.state_dict())
    assert len(other.base.state) == 0


def test_the_base_refusing_leaves_grit_alone():
    model, optimizer = built({})
    train(model, optimizer, 2)
    foreign = copy.deepcopy(optimizer.state_dict())
    foreign["param_groups"][0]["params"].pop()
    samples = optimizer.telemetry()["samples"]
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict(foreign)
    assert optimizer.telemetry()["samples"] == samples
    assert isinstance(optimizer.base, AdamW)
