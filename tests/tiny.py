"""Tiny models and loops that the tests share."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from grit_optim import GritOptimizer

VOCABULARY = 48


def llama(rank=4, seed=0, layers=2, hidden=16, **lora):
    """A PEFT Llama of 14 sites (7 projections in each of 2 layers), fp32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=hidden * 3 // 2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
    )
    lora = {"r": rank, "lora_alpha": rank, "target_modules": "all-linear", **lora}
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(**lora))


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def tokens(seed=0, batch=4, length=12):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (batch, length), generator=generator)


def loss_of(model, seed=0, **kwargs):
    ids = tokens(seed)
    return model(input_ids=ids, labels=ids, **kwargs).loss


def train(model, optimizer, steps, first=0):
    """A hand-written loop over ``steps`` batches; returns the losses."""
    losses = []
    for seed in range(first, first + steps):
        loss = loss_of(model, seed)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def adamw(model, lr=1e-2, **kwargs):
    return torch.optim.AdamW(trained(model), lr=lr, **kwargs)


def grit(model, lr=1e-2, **options):
    """GritOptimizer over AdamW, ready after one step that carries information."""
    return GritOptimizer(adamw(model, lr), model, **{"kfac_min_samples": 8, **options})


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


class HandWritten(nn.Module):
    """A frozen linear layer with LoRA written by hand, without PEFT."""

    def __init__(self, d_in=6, d_out=5, rank=3, scaling=0.5):
        super().__init__()
        self.frozen = nn.Linear(d_in, d_out).requires_grad_(False)
        self.down = nn.Linear(d_in, rank, bias=False)
        self.up = nn.Linear(rank, d_out, bias=False)
        self.scaling = scaling

    def forward(self, x):
        return self.frozen(x) + self.scaling * self.up(self.down(x))
