"""The peers: each trains, follows its schedule, takes its settings, and says what is missing."""

import math
import re
import sys

import pytest
import tiny
import torch
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.core.environment import installed_version, pinned_versions
from benchmarks.core.files import REPOSITORY, BenchmarkError
from benchmarks.core.settings import Settings
from benchmarks.peers.construct import lora_pairs, rank_side
from benchmarks.peers.registry import LR_CENTRES, PEERS
from benchmarks.training.optimizers import (
    OPTIMIZERS,
    make_optimizer,
    package_version,
    state_bytes,
    state_tensors,
)

RANK = 4
# Rates for the tiny model, at which every method takes 0.08 nats and more off in 20 steps on one batch.
RATES = {
    "loraplus": 3e-3,
    "lorafa": 0.1,
    "riemannian": 0.03,
    "lorarite": 0.01,
    "soap-rank": 0.03,
    "soap-full": 0.03,
    "shampoo-rank": 0.01,
    "shampoo-full": 0.01,
    "kl-shampoo": 0.6,
    "kl-soap": 0.03,
    "muon": 0.1,
    "singd": 0.01,
    "adamw8bit": 0.03,
}
every_peer = pytest.mark.parametrize("name", PEERS)
ANY_PARAMETER = {"loraplus", "lorafa", "riemannian", "adamw8bit"}
pairs_only = pytest.mark.parametrize("name", [name for name in PEERS if name not in ANY_PARAMETER])


def make(name, model, lr=None, **settings):
    return make_optimizer(name, model, Settings(lr or RATES[name], **settings))


def one_batch(model, optimizer, steps):
    losses = []
    for _ in range(steps):
        loss = tiny.loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@every_peer
def test_it_lowers_the_loss(name):
    model = tiny.llama(RANK, layers=1)
    losses = one_batch(model, make(name, model), 20)
    assert losses[-1] < losses[0] - 0.06


@every_peer
def test_the_rate_follows_the_schedule(name):
    model = tiny.llama(RANK, layers=1)
    optimizer = make(name, model)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates[0] == RATES[name]
    before = tiny.weights(model)
    scales = [1.0, 0.5, 0.0]
    schedule = LambdaLR(optimizer, lambda step: scales[min(step, 2)])
    for scale in scales:
        assert [group["lr"] for group in optimizer.param_groups] == [scale * rate for rate in rates]
        moved = tiny.weights(model)
        tiny.loss_of(model).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    after = tiny.weights(model)
    assert any(not torch.equal(after[key], before[key]) for key in before)
    assert all(torch.equal(after[key], moved[key]) for key in before)  # nothing moves at rate 0
    assert state_bytes(optimizer.state_dict()) > 0


@every_peer
def test_settings_reach_the_groups_as_the_table_says(name):
    model = tiny.llama(RANK, layers=1)
    groups = make(name, model, betas=(0.6, 0.95), weight_decay=0.25).param_groups
    assert PEERS[name].uses in {("lr", "betas", "weight_decay"), ("lr", "weight_decay")}
    full = [group for group in groups if group["params"]]
    if "betas" in PEERS[name].uses:
        assert {tuple(group["betas"]) for group in full} == {(0.6, 0.95)}
    else:
        assert {"betas", "beta1"}.isdisjoint(full[0])
    assert {group["weight_decay"] for group in full} == {0.25}


@pytest.mark.parametrize("name", [name for name in PEERS if PEERS[name].package != "torch"])
def test_a_missing_package_is_named_with_its_install_line(name, monkeypatch):
    package = PEERS[name].package
    model = tiny.llama(RANK, layers=1)
    for module in [package, *sys.modules]:
        if module == package or module.startswith(f"{package}."):
            monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BenchmarkError, match=rf"{name!r} needs {package}: .*pip install -e '\.\[peers\]'"):
        make(name, model)


@every_peer
def test_an_option_that_would_go_unheard_is_refused(name):
    model = tiny.llama(RANK, layers=1)
    for option in ["nonsense", "lr", "weight_decay", "loraplus_weight_decay", "params"]:
        with pytest.raises(BenchmarkError, match=f"takes no option {option}; it takes "):
            make(name, model, options={option: 1})


@pairs_only
def test_anything_but_pairs_is_refused(name):
    model = tiny.llama(RANK, layers=1)
    model.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(
        BenchmarkError, match=r"for LoRA pairs alone.*1 other parameters are, first .*norm\.weight"
    ):
        make(name, model)


def test_half_a_pair_and_no_pair_are_refused():
    model = tiny.llama(RANK, layers=1)
    for parameter in (down for down, _ in lora_pairs(model)):
        parameter.requires_grad_(False)
    with pytest.raises(BenchmarkError, match=r"7 other parameters are, first .*lora_B"):
        lora_pairs(model)
    with pytest.raises(BenchmarkError, match="but nothing is"):
        lora_pairs(torch.nn.Linear(2, 2).requires_grad_(False))


@pytest.mark.parametrize(("ratio", "options"), [(16, {}), (4, {"loraplus_lr_ratio": 4})])
def test_loraplus_gives_b_the_larger_rate(ratio, options):
    model = tiny.llama(RANK, layers=1)
    groups = make("loraplus", model, options=options).param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    pairs = lora_pairs(model)
    assert len(rates) == 2 * len(pairs)
    for down, up in pairs:
        assert rates[id(down)] == RATES["loraplus"]
        assert rates[id(up)] == pytest.approx(ratio * RATES["loraplus"])


def test_lorafa_leaves_a_as_it_was():
    model = tiny.llama(RANK, layers=1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    one_batch(model, make("lorafa", model), 2)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_B" in name}


def test_lorarite_gets_each_a_with_its_own_b():
    model = tiny.llama(RANK)
    names = {id(p): name for name, p in model.named_parameters()}
    handed = make("lorarite", model).param_groups[0]["params"]
    downs, ups = ([names[id(p)] for p in handed[start::2]] for start in (0, 1))
    assert len(downs) == 14
    assert [name.replace("lora_A", "lora_B") for name in downs] == ups
    assert all("lora_A" in name for name in downs)


def products(model):
    return [(up @ down).detach().clone() for down, up in lora_pairs(model)]


def test_lorarite_moves_the_product_alike_in_any_scale():
    """What the method promises, and what it can only keep if pairs and rank dimensions are the right ones."""
    changes = []
    for rescaled in (False, True):
        model = tiny.llama(RANK, layers=1)
        with torch.no_grad():
            for place, (down, up) in enumerate(lora_pairs(model)):
                up.normal_(std=0.1, generator=torch.Generator().manual_seed(place))
                if rescaled:
                    down.mul_(2.0 + place)
                    up.div_(2.0 + place)
        before = products(model)
        one_batch(model, make("lorarite", model), 2)
        changes.append([after - start for after, start in zip(products(model), before, strict=True)])
    for plain, other in zip(*changes, strict=True):
        assert (plain - other).norm() < 1e-2 * plain.norm()


@pytest.mark.parametrize("name", ["soap-rank", "shampoo-rank"])
def test_rank_variants_keep_no_matrix_beyond_the_rank(name):
    model = tiny.llama(RANK, layers=1)
    optimizer = make(name, model)
    one_batch(model, optimizer, 3)
    assert len(optimizer.state) == 14
    for parameter, state in optimizer.state.items():
        found = [
            tensor for tensor in state_tensors(state) if tensor.dim() >= 2 and tensor.shape != parameter.shape
        ]
        assert {tuple(tensor.shape[-2:]) for tensor in found} == {(RANK, RANK)}
        assert {tensor.numel() for tensor in found} == {
            RANK * RANK
        }  # one block per side, one side per matrix
        assert not any(
            torch.allclose(tensor, torch.eye(RANK), atol=1e-3) for tensor in found
        )  # they are at work


@pytest.mark.parametrize("name", ["soap-full", "shampoo-full", "kl-soap", "kl-shampoo"])
def test_full_variants_precondition_both_sides(name):
    model = tiny.llama(RANK, layers=1)
    optimizer = make(name, model)
    one_batch(model, optimizer, 3)
    for parameter, state in optimizer.state.items():
        shapes = {tuple(tensor.shape[-2:]) for tensor in state_tensors(state) if tensor.dim() >= 2}
        assert {(side, side) for side in parameter.shape} <= shapes


def test_a_rank_as_wide_as_the_layer_is_refused_where_size_decides():
    assert rank_side(tiny.llama(15, layers=1)) == 15
    with pytest.raises(BenchmarkError, match=r"largest rank is 16, the narrowest layer 16 wide"):
        make("soap-rank", tiny.llama(16, layers=1))


def test_heavyball_does_not_compile_on_cpu():
    import heavyball

    heavyball.utils.compile_mode = "max-autotune-no-cudagraphs"
    make("kl-soap", tiny.llama(RANK, layers=1))
    assert heavyball.utils.compile_mode is None


def test_singd_listens_to_training_alone():
    """A held-out evaluation leaves no statistics behind, and every adapter matrix has its factors."""
    model = tiny.llama(RANK, layers=1)
    optimizer = make("singd", model)
    assert len(optimizer.module_names) == 14
    assert all("lora_" in name for name in optimizer.module_names.values())
    with torch.inference_mode():
        tiny.loss_of(model)
    assert optimizer.H_Ks == {}
    tiny.loss_of(model).backward()
    assert set(optimizer.H_Ks) == set(optimizer.module_names.values())


def test_8bit_moments_are_8_bit():
    model = tiny.llama(16, layers=1)
    sizes = {}
    for limit in (64, 10_000):
        optimizer = make("adamw8bit", model, options={"min_8bit_size": limit})
        one_batch(model, optimizer, 1)
        kinds = {state["state1"].dtype for state in optimizer.state.values()}
        assert kinds == {torch.uint8 if limit == 64 else torch.float32}
        sizes[limit] = state_bytes(optimizer.state_dict())
    assert sizes[64] < 0.6 * sizes[10_000]


def test_state_is_counted_in_objects_and_once():
    class Holder:
        def __init__(self):
            self.matrix, self.name = torch.zeros(3, 3), "name"
            self.itself = self

    shared = torch.zeros(10, dtype=torch.uint8)
    assert state_bytes({"a": Holder(), "b": [shared, (shared, None)], "c": shared, "d": 1.5}) == 36 + 10
    model = tiny.llama(RANK, layers=1)
    dense = sum(4 * (down.shape[1] ** 2 + 2 * RANK**2 + up.shape[0] ** 2) for down, up in lora_pairs(model))
    assert state_bytes(make("singd", model).state_dict()) >= dense  # K and C of A and of B


def test_names_centres_and_versions_go_together():
    assert set(PEERS) < set(OPTIMIZERS)
    assert set(LR_CENTRES) == {"adamw", "grit", *PEERS}
    assert all(0 < centre < math.inf for centre in LR_CENTRES.values())
    assert set(RATES) == set(PEERS)
    for name, peer in PEERS.items():
        pin = pinned_versions()[peer.package]
        assert installed_version(peer.package).split("+")[0] == pin, name
        assert package_version(name) == {peer.package: installed_version(peer.package)}
    assert package_version("adamw") == package_version("grit") == {}


def test_the_benchmarks_page_lists_every_peer_as_it_is():
    page = (REPOSITORY / "docs" / "benchmarks.md").read_text(encoding="utf8")
    rows = re.findall(r"^\| `([\w-]+)` \| (\w+) ([\d.]+) \| (.+?) \| .+ \|$", page, flags=re.MULTILINE)
    listed = {name: (package, version, uses) for name, package, version, uses in rows}
    words = {"lr": "rate", "betas": "betas", "weight_decay": "weight decay"}
    assert listed == {
        name: (peer.package, pinned_versions()[peer.package], ", ".join(words[one] for one in peer.uses))
        for name, peer in PEERS.items()
    }
