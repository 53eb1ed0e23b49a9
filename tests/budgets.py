"""What the tests of a rank budget share."""

import torch

BUDGET = {"reprojection": "balanced", "reprojection_freq": 2, "rank_budget": 0.5, "min_lora_rank": 0}


def pairs_of(model):
    """(name, A with its rank first, B with its rank first) per site."""
    state = dict(model.named_parameters())
    return [(n, p, state[n.replace("lora_A", "lora_B")].T) for n, p in state.items() if "lora_A" in n]


def kept_parameters(model):
    return sum(
        int(torch.count_nonzero(m.abs().sum(1))) * m.shape[1] for _, *pair in pairs_of(model) for m in pair
    )
