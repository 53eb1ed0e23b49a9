"""Telemetry: every site's numbers against the formula, records, and that no step waits for them."""

import json
import math

import pytest
import support
import tiny
import torch
from recording import recorded, rounded
from stepping import one_step, sites_of
from torch.utils._python_dispatch import TorchDispatchMode

from grit_optim.telemetry.snapshot import Snapshot

SCALARS = {
    "rank", "samples", "engaged", "damping_A", "damping_B",
    *(f"{name}_{letter}" for name in ("trace", "top", "condition", "effective_rank") for letter in "ag"),
    *(f"{name}_{side}" for name in ("gradient_norm", "norm_without", "norm_with", "angle") for side in "AB"),
}  # fmt: skip


def test_every_site_tells_its_numbers():
    model, optimizer, before, gradients = one_step({"precondition": "steer", "kfac_damping": 0.03})
    told, after = optimizer.telemetry()["per_site"], tiny.weights(model)
    names = dict(zip(told, sites_of(model, optimizer), strict=True))
    assert len(names) == 14
    for site, (a, b, sigma_a, sigma_g) in names.items():
        numbers = told[site]
        assert numbers.keys() == SCALARS | {"eigenvalues_a", "eigenvalues_g"}
        for letter, sigma in (("a", sigma_a), ("g", sigma_g)):
            values = torch.linalg.eigvalsh(sigma).flip(0)
            shares = values / values.sum()
            assert numbers[f"eigenvalues_{letter}"] == rounded(values.tolist())
            assert numbers[f"trace_{letter}"] == rounded(sigma.trace().item())
            assert numbers[f"condition_{letter}"] == pytest.approx((values[0] / values[-1]).item(), rel=1e-2)
            assert numbers[f"effective_rank_{letter}"] == rounded(
                math.exp(-(shares * shares.log()).sum().item())
            )
        for side, name, sigma in (("A", a, sigma_g), ("B", b, sigma_a)):
            gradient, moved = gradients[name].double(), (before[name] - after[name]).double()
            cosine = (gradient * moved).sum() / (gradient.norm() * moved.norm())
            assert numbers[f"gradient_norm_{side}"] == rounded(gradient.norm().item())
            assert numbers[f"norm_without_{side}"] == rounded(1e-2 * gradient.norm().item())
            assert numbers[f"norm_with_{side}"] == rounded(moved.norm().item())
            assert numbers[f"angle_{side}"] == pytest.approx(math.degrees(math.acos(cosine)), abs=0.05)
            assert numbers[f"damping_{side}"] == rounded(0.03 * sigma.trace().item() / 4)
        assert (numbers["rank"], numbers["engaged"]) == (4, True)


def test_what_is_not_engaged_has_not_been_turned():
    _, optimizer, _, _ = one_step({"precondition": "steer", "kfac_min_samples": 10**6})
    told = optimizer.telemetry()
    assert len(told["per_site"]) == 14
    for numbers in told["per_site"].values():
        assert (numbers["engaged"], numbers["angle_A"], numbers["angle_B"]) == (False, 0, 0)
        assert numbers["norm_with_A"] == numbers["norm_without_A"] > 0
    assert told["mean_cosine"] == 1


def test_inverse_tells_the_natural_gradients_norm():
    """Before the norm is restored: what the trust region of a trainer's clipping would be set by."""
    model, optimizer, _, gradients = one_step({"precondition": "inverse", "kfac_damping": 0.05})
    told = optimizer.telemetry()["per_site"]
    for numbers, (a, _, _, sigma_g) in zip(told.values(), sites_of(model, optimizer), strict=True):
        damped = sigma_g + 0.05 * sigma_g.trace() / 4 * torch.eye(4)
        natural = torch.linalg.solve(damped, gradients[a].double())
        assert numbers["norm_with_A"] == pytest.approx(natural.norm().item(), rel=1e-3)
        assert numbers["norm_without_A"] == rounded(gradients[a].norm().item())


def test_telemetry_without_sites_is_short():
    model = tiny.llama()
    optimizer = tiny.grit(model)
    tiny.train(model, optimizer, 2)
    assert "per_site" not in optimizer.telemetry(per_site=False)
    assert json.dumps(optimizer.telemetry(), allow_nan=False)


# -------------------------------------------------------------------- records


def test_records_come_at_the_first_step_every_so_many_and_the_last():
    _, records, losses = recorded({})
    assert [(r["kind"], r["step"]) for r in records] == [
        ("start", 0), ("step", 1), ("step", 3), ("step", 6), ("step", 7), ("end", 7),
    ]  # fmt: skip
    steps = [r for r in records if r["kind"] == "step"]
    assert [r["loss"] for r in steps[:3]] == rounded([losses[0], losses[2], losses[5]])
    assert steps[3]["loss"] is None, "by close() the loss of that step is gone"
    for record in steps:
        assert record["sites"].keys() >= SCALARS - {"norm_without_A", "norm_with_A", "angle_A"}
        assert all(len(column) == 14 for column in record["sites"].values())
        assert "eigenvalues_a" not in record["sites"]
    assert [site["name"] for site in records[0]["sites"]] == list(records[-1]["final"])
    assert steps[-1]["engaged_sites"] == 14
    assert steps[-1]["lr"] == 1e-2


def test_spectra_and_eigenvectors_on_request():
    log = {
        "log_fisher_spectrum": True,
        "log_top_eigs": 2,
        "log_eig_heatmaps": True,
        "log_eig_heatmaps_modules": 3,
    }
    optimizer, records, _ = recorded({}, **log)
    last = records[-2]["sites"]
    assert {len(values) for values in last["eigenvalues_a"] + last["eigenvalues_g"]} == {2}
    assert len(last["eigenvectors_a"]) == 3
    factor = optimizer.curvature[0].factors.activation[0].double()
    vectors = torch.tensor(last["eigenvectors_a"][0], dtype=torch.float64)
    diagonal = vectors.T @ factor @ vectors
    torch.testing.assert_close(
        diagonal.diagonal()[:2], torch.tensor(last["eigenvalues_a"][0]).double(), rtol=1e-4, atol=0
    )
    assert (diagonal - torch.diag(diagonal.diagonal())).abs().max() < 1e-4 * diagonal.max()


def test_mode_none_tells_gradient_norms_too():
    _, records, _ = recorded({"precondition": "none"})
    norms = records[1]["sites"]["gradient_norm_B"]
    assert len(norms) == 14
    assert min(norms) > 0


def test_logging_changes_no_weight():
    weights = []
    for mode in ("spectral", "none", "eigenbasis"):
        for log in (False, True):
            model = tiny.llama()
            optimizer = tiny.grit(model, precondition=mode)
            if log:
                optimizer.log_to(
                    lambda record: None, every=1, log_fisher_spectrum=True, log_eig_heatmaps=True
                )
            tiny.train(model, optimizer, 4)
            weights.append(tiny.weights(model))
    for plain, logged in zip(weights[::2], weights[1::2], strict=True):
        assert len(plain) == 28
        assert all(torch.equal(plain[name], logged[name]) for name in plain)


class Reads(TorchDispatchMode):
    """Counts values that are read back to Python: on a GPU each would wait for the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_no_step_waits_for_what_is_recorded(monkeypatch):
    """While the copies are on their way, a recorded step reads back as many values as one without a sink."""
    monkeypatch.setattr(Snapshot, "arrived", lambda self: False)
    counts = []
    for log in (False, True):
        model = tiny.llama()
        optimizer = tiny.grit(model, adaptive_schedule=log)
        tiny.train(model, optimizer, 6)  # beyond the steps in which the taps are verified
        if log:
            optimizer.log_to(lambda record: None, every=1)
        for seed in range(3):
            loss = tiny.loss_of(model, seed)
            loss.backward()
            with Reads() as reads:
                if log:
                    optimizer.observe(loss)
                optimizer.step()
            optimizer.zero_grad()
            counts.append(reads.count)
    assert counts[:3] == counts[3:]
    with Reads() as reads:
        optimizer.telemetry()
    assert reads.count > 0, "the counter does count"


def test_pending_records_are_bounded_and_written_in_order(monkeypatch):
    monkeypatch.setattr(Snapshot, "arrived", lambda self: False)
    model, records = tiny.llama(), []
    optimizer = tiny.grit(model)
    optimizer.log_to(records.append, every=1)
    tiny.train(model, optimizer, 9)
    assert [r["step"] for r in records if r["kind"] == "step"] == [1, 2, 3, 4, 5]
    optimizer.finish_logging()
    assert [r["step"] for r in records if r["kind"] == "step"] == list(range(1, 10))


def test_dropped_statistics_are_counted_in_the_records():
    model, records = tiny.llama(init_lora_weights=False), []
    optimizer = tiny.grit(model)
    optimizer.log_to(records.append, every=1)
    loss = tiny.loss_of(model) * torch.nan
    loss.backward()
    optimizer.observe(loss)
    optimizer.step()
    assert records[-1]["dropped_folds"] == 1
    assert records[-1]["loss"] is None
    assert json.dumps(records, allow_nan=False)


# -------------------------------------------------------------------- final ranks


def test_final_ranks_and_parameter_counts(tmp_path):
    model = tiny.llama(init_lora_weights=False)
    optimizer = tiny.grit(model, reprojection="balanced", reprojection_k=3, reprojection_freq=2)
    tiny.train(model, optimizer, 5)
    final = optimizer.final_ranks(tmp_path / "ranks.json")
    assert final.keys() == optimizer.ranks().keys()
    for site in support.sites(optimizer):
        told = final[site.name]
        assert (told["base_r"], told["final_k_a"], told["final_k_b"]) == (4, 3, 3)
        assert told["parameters"] == site.a.numel() + site.b.numel()
        assert told["parameters_kept"] == site.a[:3].numel() + site.b[:, :3].numel()
        assert 1 <= told["effective_rank_a"] <= 3
    written = json.loads((tmp_path / "ranks.json").read_text())
    assert written["sites"] == final
    assert written["parameters"] == sum(p.numel() for p in tiny.trained(model))
    assert written["parameters_kept"] == written["parameters"] * 3 // 4


# -------------------------------------------------------------------- what log_to refuses

INVALID = [
    ({"sink": 3}, TypeError, "a path or something that can be called"),
    ({"every": 0}, ValueError, "every must be at least 1"),
    ({"every": 2.5}, TypeError, "every must be a whole number"),
    ({"log_top_eigs": 0}, ValueError, "log_top_eigs must be at least 1"),
    ({"log_eig_heatmaps_modules": "all"}, TypeError, "log_eig_heatmaps_modules must be a whole number"),
    ({"log_fisher_spectrum": 1}, TypeError, "log_fisher_spectrum must be True or False"),
    ({"log_eig_heatmaps": None}, TypeError, "log_eig_heatmaps must be True or False"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), INVALID, ids=[str(a) for a, *_ in INVALID])
def test_log_to_refuses(tmp_path, arguments, error, message):
    optimizer = tiny.grit(tiny.llama())
    with pytest.raises(error, match=message):
        optimizer.log_to(**{"sink": tmp_path / "run.jsonl", **arguments})
    assert list(tmp_path.iterdir()) == [], "no file is left behind"


def test_a_sink_that_fails_is_given_up_and_training_goes_on():
    def full(record):
        if record["kind"] == "step":
            raise OSError("no space left on device")

    model = tiny.llama()
    optimizer = tiny.grit(model)
    others = []
    optimizer.log_to(full, every=1)
    optimizer.log_to(others.append, every=1)
    with pytest.warns(UserWarning, match="failed on the 'step' record of step 1.*no space left"):
        tiny.train(model, optimizer, 3)
    assert [r["step"] for r in others] == [0, 1, 2, 3]


def test_copies_have_no_sinks(tmp_path):
    import copy

    model = tiny.llama()
    optimizer = tiny.grit(model)
    optimizer.log_to(tmp_path / "run.jsonl", every=1)
    twin_model, twin = copy.deepcopy((model, optimizer))
    tiny.train(twin_model, twin, 2)
    assert len((tmp_path / "run.jsonl").read_text().splitlines()) == 1
