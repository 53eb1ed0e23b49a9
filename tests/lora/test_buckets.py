"""How pairs are stacked: by rank and device, and within that by the base's parameter groups."""

import pytest
import torch
from tiny import llama, train, trained
from torch.optim import AdamW
from twin import warm

from grit_optim import GritOptimizer
from grit_optim.lora.buckets import build_buckets
from grit_optim.lora.discovery import find_sites


def test_buckets_hold_sites_of_one_rank():
    model = llama(rank_pattern={"q_proj": 2, "down_proj": 7})
    sites, _ = find_sites(model, trained(model))
    buckets = build_buckets(sites)
    assert {bucket.rank: len(bucket.sites) for bucket in buckets} == {2: 2, 4: 10, 7: 2}
    assert sorted(name for b in buckets for name in b.names()) == sorted(site.name for site in sites)
    for bucket in buckets:
        for side in "AB":
            groups = [g for g in bucket.groups if g.side == side]
            index = torch.cat([g.index for g in groups]).tolist()
            assert sorted(index) == list(range(len(bucket.sites)))
            for group in groups:
                of = [getattr(bucket.sites[i], side.lower()) for i in group.index.tolist()]
                assert all(p is q for p, q in zip(group.parameters, of, strict=True))
                assert len({(p.shape, p.dtype) for p in group.parameters}) == 1


def plus_groups(model):
    """LoRA+ style: A and B apart, each with its own rate and decay, and layer 1's A apart again."""

    def chosen(letter, layer):
        return [
            p for n, p in model.named_parameters() if p.requires_grad and f"lora_{letter}" in n and layer in n
        ]

    return [
        {"params": chosen("A", "layers.0."), "lr": 1e-2, "weight_decay": 0.1},
        {"params": chosen("A", "layers.1."), "lr": 3e-3, "weight_decay": 0.0},
        {"params": chosen("B", "layers."), "lr": 5e-2, "weight_decay": 0.5},
    ]


@pytest.mark.parametrize("reloaded", [False, True], ids=["built", "reloaded"])
def test_steering_takes_each_groups_own_rate_and_decay(reloaded):
    """Decay stays outside, and the rest has the base's length: true only with that group's own lr·wd."""
    ours, plain = warm(llama()), warm(llama())
    base = AdamW(plus_groups(plain))
    optimizer = GritOptimizer(AdamW(plus_groups(ours)), ours, precondition="steer", kfac_min_samples=8)
    if reloaded:
        optimizer.load_state_dict(optimizer.state_dict())
    for settings in (*optimizer.param_groups, *base.param_groups):  # a schedule reaches the decay as well
        settings["lr"] *= 2
    decay = {id(p): 1 - g["lr"] * g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    before = [p.detach().clone() for p in trained(ours)]
    train(ours, optimizer, 1)
    train(plain, base, 1)
    turned = 0
    for w, p, q in zip(before, trained(ours), trained(plain), strict=True):
        steered, taken = p.detach() - decay[id(p)] * w, q.detach() - decay[id(p)] * w
        assert float(steered.norm()) == pytest.approx(float(taken.norm()), rel=1e-4)
        turned += float((steered * taken).sum() / taken.norm() ** 2) < 0.999
    assert turned == 28
    assert optimizer.telemetry()["engaged_sites"] == 14
