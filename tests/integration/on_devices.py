"""Tiny models on a device, for the tests that run on the CPU and on a GPU."""

import tiny
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

WAITING_FOR_NOTHING = ["spectral", "steer", "inverse", "none"]
"""Modes whose steps never wait for the device; the others wait for eigendecompositions."""


def loss_on(model, seed=0):
    """With plain attention: the fused kernels may add up in another order each time."""
    ids = tiny.tokens(seed).to(next(model.parameters()).device)
    with sdpa_kernel(SDPBackend.MATH):
        return model(input_ids=ids, labels=ids).loss


def train(model, optimizer, steps, first=0):
    for seed in range(first, first + steps):
        loss_on(model, seed).backward()
        optimizer.step()
        optimizer.zero_grad()


def started(device, dtype=torch.float32, **options):
    """A model with B ≠ 0 on the device, and its optimizer."""
    model = tiny.llama(init_lora_weights=False).to(device, dtype)
    return model, tiny.grit(model, lr=1e-3, **options)


def on_cpu(model):
    return {name: value.cpu() for name, value in tiny.weights(model).items()}
