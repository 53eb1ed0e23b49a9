"""Three linear layers with LoRA, of any size: the smallest model on which whole runs are compared."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from grit_optim import GritOptimizer


class Layered(nn.Module):
    def __init__(self, d_in, width, d_out):
        super().__init__()
        self.first = nn.Linear(d_in, width)
        self.second = nn.Linear(width, width)
        self.third = nn.Linear(width, d_out)

    def forward(self, x):
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


def model(d_in=6, width=8, d_out=5, rank=3, sites=3, seed=0, **lora):
    """B is not zero at the start, so that the factors are known after one step."""
    torch.manual_seed(seed)
    targets = ["first", "second", "third"][:sites]
    settings = {"r": rank, "lora_alpha": rank, "target_modules": targets, "init_lora_weights": False, **lora}
    return get_peft_model(Layered(d_in, width, d_out), LoraConfig(**settings))


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def grit(model, base=torch.optim.AdamW, settings=None, **options):
    made = base(trained(model), **{"lr": 1e-2, **(settings or {})})
    return GritOptimizer(made, model, **{"kfac_min_samples": 4, **options})


def batch(model, seed, size=12):
    linear = model.base_model.model
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, linear.first.in_features, generator=generator)
    return x, torch.randn(size, linear.third.out_features, generator=generator)


def loss_of(model, seed=0):
    x, y = batch(model, seed)
    return (model(x) - y).square().mean()


def train(model, optimizer, steps, first=0):
    for seed in range(first, first + steps):
        optimizer.zero_grad()
        loss_of(model, seed).backward()
        optimizer.step()


def answer(model):
    with torch.no_grad():
        return model(batch(model, 99)[0])


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def same(left, right):
    """Whether two nested states are equal, bit for bit and type for type."""
    if isinstance(left, torch.Tensor):
        alike = isinstance(right, torch.Tensor) and left.dtype == right.dtype and left.shape == right.shape
        return alike and torch.equal(left.nan_to_num(7.0), right.nan_to_num(7.0))
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    return left == right or left != left
