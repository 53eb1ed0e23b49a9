"""Adapters that are trained a little and exported, for the tests of what is saved."""

import warnings

import bases
import support
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from grit_optim import GritOptimizer

LLAMA = {"r": 6, "lora_alpha": 6, "target_modules": "all-linear"}


def start(kind, config, base_folder):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(
            bases.make(kind, base_folder), LoraConfig(**config), autocast_adapter_dtype=kind != "bf16"
        )


def train(kind, model, optimizer, steps=4):
    for seed in range(steps):
        if kind == "nested":
            model(torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
        else:
            tiny.loss_of(model, seed).backward()
        optimizer.step()
        optimizer.zero_grad()


def grit(model, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # embeddings cannot be tapped
        return GritOptimizer(tiny.adamw(model), model, kfac_min_samples=1, min_lora_rank=0, **options)


def chosen(optimizer, by_end):
    """The ranks of a case: the longest end of a site's name decides."""
    ranks = {}
    for site in support.sites(optimizer):
        if site.fixed:
            continue
        layer = site.name.removesuffix(f".{site.adapter}")
        ends = [end for end in by_end if layer.endswith(end)]
        ranks[site.name] = min(site.rank, by_end[max(ends, key=len)] if ends else site.rank // 2)
    return ranks


SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": tiny.VOCABULARY}


def small_llama(**settings):
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**SMALL, **heads, **settings))
