"""A small PEFT network without attention, for tests that run it many times."""

import torch
from peft import LoraConfig, get_peft_model
from tiny import trained
from torch import nn

from grit_optim import GritOptimizer


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def network(rank=3, **lora):
    """A network of two pairs whose B is not zero."""
    torch.manual_seed(0)
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=["first", "second"], init_lora_weights=False, **lora
    )
    return get_peft_model(Layers(), config)


def wrapped(model, base=torch.optim.AdamW, settings=None, **options):
    optimizer = base(trained(model), **(settings or {"lr": 1e-2}))
    return GritOptimizer(optimizer, model, **{"kfac_min_samples": 8, "min_lora_rank": 1, **options})


def loss_of(model, seed):
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(seed))
    return model(x).square().mean()


def train(model, optimizer, steps, first=0):
    for seed in range(first, first + steps):
        loss_of(model, seed).backward()
        optimizer.step()
        optimizer.zero_grad()


def everything(model, optimizer):
    """Weights, the base's state and ours, as copies."""
    state = optimizer.state_dict()
    return _copied([list(model.parameters()), state["state"], state["grit"]])


def _copied(value):
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, list | tuple) else value


def assert_same(a, b, path=""):
    """Containers, numbers and tensors are equal, these bit for bit and in dtype."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, path
        assert torch.equal(a.nan_to_num(), b.nan_to_num()), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}[{i}]")
    else:
        assert a == b or (a != a and b != b), path
