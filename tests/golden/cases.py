"""Short runs whose weights are frozen in ``golden.json``, and checkpoints of before that have to load.

``python tests/golden/cases.py`` writes both anew. Do so only where a change of the numbers is meant, and say
why in the
commit: a change of the structure alone leaves every bit as it was.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import tiny  # noqa: E402

from grit_optim import GritOptimizer, presets  # noqa: E402

FILE = HERE / "golden.json"
CHECKPOINTS = HERE / "checkpoints"
STEPS, SAVED_AT = 9, 5

MODES = ("spectral", "steer", "eigenbasis", "balanced", "inverse", "none")
# The paper's settings with periods short enough to be met within a test.
SHORT_PAPER = {
    **presets.PAPER,
    "kfac_update_freq": 3,
    "kfac_min_samples": 8,
    "cov_update_freq": 2,
    "reprojection_freq": 4,
    "reprojection_k": 3,
    "min_lora_rank": 2,
    "rank_adaptation_threshold": 0.6,
}
ADAPTING = {
    "reprojection": "balanced",
    "reprojection_freq": 3,
    "enable_rank_adaptation": True,
    "rank_adaptation_threshold": 0.9,
    "min_lora_rank": 1,
}
BUDGET = {"reprojection": "balanced", "reprojection_freq": 2, "rank_budget": 0.5, "min_lora_rank": 0}
LATER = {"rank_adaptation_start_step": 2, "rank_budget_steps": 4}


def _adamw(parameters, **settings):
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, **settings)


def _bitsandbytes(name, **settings):
    def make(parameters):
        import bitsandbytes

        return getattr(bitsandbytes.optim, name)(parameters, lr=1e-2, **settings)

    return make


def _peer(name, **settings):
    def make(parameters):
        import pytorch_optimizer

        return getattr(pytorch_optimizer, name)(parameters, **{"lr": 1e-2, **settings})

    return make


def _schedule_free(parameters):
    import schedulefree

    optimizer = schedulefree.AdamWScheduleFree(parameters, lr=1e-2, warmup_steps=3)
    optimizer.train()
    return optimizer


BASES = {
    "adamw": _adamw,
    "adamw-beta1-0": lambda p: _adamw(p, betas=(0.0, 0.99)),
    "adamw-amsgrad": lambda p: _adamw(p, amsgrad=True),
    "adamw-maximize": lambda p: _adamw(p, maximize=True),
    "adam-coupled-decay": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "radam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-1),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9, dampening=0.1, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "muon": lambda p: torch.optim.Muon(p, lr=1e-2),
    "adamw8bit": _bitsandbytes("AdamW8bit", min_8bit_size=16),
    "bnb-lion": _bitsandbytes("Lion", weight_decay=0.1),
    "bnb-rmsprop": _bitsandbytes("RMSprop"),
    "schedule-free": _schedule_free,
    "prodigy": _peer("Prodigy", lr=1.0),
    "adabelief": _peer("AdaBelief"),
}


def _cases():
    """Name to (options, base's name, what else is special)."""
    for mode in MODES:
        chosen = {"precondition": mode}
        if mode == "balanced":  # by itself every tenth step, which no short run sees
            chosen["kfac_update_freq"] = 2
        yield mode, chosen, "adamw", {}
        yield f"{mode}, throttled", {**chosen, "kfac_update_freq": 3, "cov_update_freq": 2}, "adamw", {}
        yield f"{mode}, adapting", {**chosen, "kfac_update_freq": 2, **ADAPTING}, "adamw", {}
        yield f"{mode}, budget", {**chosen, **BUDGET, **LATER}, "adamw", {}
        yield f"{mode}, clipped", {**chosen, "max_grad_norm": 0.05, "ng_warmup_steps": 2}, "adamw", {}
        yield (
            f"{mode}, penalties",
            {
                **chosen,
                "lambda_kfac": 0.1,
                "lambda_reproj": 0.1,
                "reprojection_k": 2,
                "regularizer_warmup_steps": 4,
            },
            "adamw",
            {},
        )
        for projection in ("two_sided", "one_sided"):
            fixed = {"reprojection": projection, "reprojection_freq": 3, "reprojection_k": 3}
            yield f"{mode}, {projection}", {**chosen, **fixed}, "adamw", {}
    for base in BASES:
        for mode in ("spectral", "steer", "eigenbasis", "inverse", "none"):
            yield f"{mode} around {base}", {"precondition": mode}, base, {}
        yield f"balanced around {base}", {"precondition": "balanced", "kfac_update_freq": 2}, base, {}
        yield f"spectral, budget, around {base}", {**BUDGET, **LATER}, base, {}
    for fisher in ("diagonal", "block_diagonal", "ekfac"):
        for mode in ("spectral", "steer", "inverse"):
            yield (
                f"{mode} by {fisher}",
                {"precondition": mode, "fisher": fisher, "kfac_update_freq": 2},
                "adamw",
                {},
            )
    yield (
        "eigenbasis by block_diagonal",
        {"precondition": "eigenbasis", "fisher": "block_diagonal"},
        "adamw",
        {},
    )
    yield "paper", SHORT_PAPER, "adamw", {}
    yield "paper as shipped", dict(presets.PAPER), "adamw", {}
    yield "paper around sgd", SHORT_PAPER, "sgd-momentum", {}
    for schedule in ("cosine", "adaptive"):
        yield (
            f"budget, {schedule}",
            {**BUDGET, **LATER, "rank_budget_steps": 6, "rank_budget_schedule": schedule},
            "adamw",
            {},
        )
    rising = {"rank_budget_start": 0.3, "rank_budget": 0.9, "rank_regrowth": True, "rank_budget_steps": 6}
    yield "budget, rising", {**BUDGET, **rising}, "adamw", {}
    yield "budget, rising, schedule-free", {**BUDGET, **rising}, "schedule-free", {}
    yield "budget, falling from 0.8", {**BUDGET, **LATER, "rank_budget_start": 0.8}, "adamw", {}
    yield "reduced and shrunk", {"min_lora_rank": 0}, "adamw", {"shrink_at": 5, "to": 0.5}
    yield (
        "eigenbasis, reduced and shrunk",
        {"precondition": "eigenbasis", "min_lora_rank": 0},
        "adamw",
        {"shrink_at": 5, "to": 0.5},
    )
    for name, value in (
        ("pairing", "paper"),
        ("damping", "absolute"),
        ("kfac_power", 0),
        ("kfac_power", 1.0),
        ("kfac_power", 0.3),
        ("direction_momentum", "base"),
        ("direction_momentum", 0.3),
        ("step_length", "base"),
        ("step_length", 0.4),
        ("fisher_decay", None),
        ("max_tokens", 7),
        ("adaptive_schedule", True),
        ("kfac_inversion_device", "cpu"),
    ):
        yield f"{name}={value}", {name: value}, "adamw", {}
    yield "inverse, natural length", {"precondition": "inverse", "preserve_norm": False}, "adamw", {}
    yield (
        "steer, power and momentum",
        {
            "precondition": "steer",
            "kfac_power": 0.5,
            "direction_momentum": 0.5,
            "step_length": 0.5,
        },
        "adamw",
        {},
    )
    yield "long enough to adapt", {"adaptive_schedule": True, "kfac_update_freq": 4}, "adamw", {"steps": 45}
    yield "accumulated", {}, "adamw", {"micro": 2}
    yield "autocast", {}, "adamw", {"autocast": True}
    yield "mixed ranks", {}, "adamw", {"lora": {"rank_pattern": {"q_proj": 2}, "use_rslora": True}}
    yield "two groups", {}, "adamw", {"groups": True}
    yield "trained head", {}, "adamw", {"lora": {"modules_to_save": ["lm_head"]}}


CASES = {name: (options, base, how) for name, options, base, how in _cases()}

SAVED = {
    **{mode: {"precondition": mode, "kfac_update_freq": 2} for mode in MODES},
    "spectral-every-step": {},
    "adapting": {"kfac_update_freq": 2, **ADAPTING},
    "budget": {**BUDGET, **LATER, "rank_budget_schedule": "adaptive"},
    "rising": {
        **BUDGET,
        "rank_budget_start": 0.3,
        "rank_budget": 0.9,
        "rank_regrowth": True,
        "rank_budget_steps": 6,
    },
    "adaptive": {"adaptive_schedule": True, "kfac_update_freq": 2},
    "penalties": {"lambda_kfac": 0.1, "kfac_update_freq": 2},
    "paper": SHORT_PAPER,
    "block_diagonal": {"fisher": "block_diagonal"},
    "diagonal": {"fisher": "diagonal", "precondition": "inverse"},
    "ekfac": {"fisher": "ekfac", "precondition": "steer", "kfac_update_freq": 2},
}


def build(options, base="adamw", how=None):
    """A tiny model of seven pairs and its optimizer."""
    how = how or {}
    model = tiny.llama(layers=1, **how.get("lora", {}))
    parameters = tiny.trained(model)
    if how.get("groups"):
        parameters = [{"params": parameters[0::2]}, {"params": parameters[1::2], "lr": 3e-3}]
    return model, GritOptimizer(BASES[base](parameters), model, **{"kfac_min_samples": 8, **options})


def advance(model, optimizer, first, last, micro=1, autocast=False):
    """The steps from ``first`` up to ``last``, each on batches of its own."""
    for step in range(first, last):
        for i in range(micro):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                loss = tiny.loss_of(model, 100 * i + step)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def run(name):
    """The weights at the end of a case."""
    options, base, how = CASES[name]
    model, optimizer = build(options, base, how)
    keywords = {key: how[key] for key in ("micro", "autocast") if key in how}
    last, cut = how.get("steps", STEPS), how.get("shrink_at", 0)
    advance(model, optimizer, 0, cut, **keywords)
    if cut:
        optimizer.reduce_ranks_(how["to"])
        optimizer.shrink_()
    advance(model, optimizer, cut, last, **keywords)
    return tiny.weights(model)


def save(name):
    """Write the checkpoint of a run; returns where the run goes on to from there."""
    model, optimizer = build(SAVED[name])
    advance(model, optimizer, 0, SAVED_AT)
    torch.save(
        {"weights": tiny.weights(model), "optimizer": optimizer.state_dict()}, CHECKPOINTS / f"{name}.pt"
    )
    advance(model, optimizer, SAVED_AT, STEPS)
    return tiny.weights(model)


def load(name):
    """The model and optimizer of a checkpoint."""
    saved = torch.load(CHECKPOINTS / f"{name}.pt", weights_only=True)
    model, optimizer = build(SAVED[name])
    model.load_state_dict(saved["weights"], strict=False)
    optimizer.load_state_dict(saved["optimizer"])
    return model, optimizer


def resume(name):
    """The weights that the run of a checkpoint goes on to."""
    model, optimizer = load(name)
    advance(model, optimizer, SAVED_AT, STEPS)
    return tiny.weights(model)


def bits(weights):
    """SHA-256 of all weights, to the bit."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def probe(weights):
    """Five numbers that a change of any weight moves: the norm, and products with random signs."""
    flat = torch.cat([weights[name].detach().double().flatten() for name in sorted(weights)])
    signs = (
        torch.randint(0, 2, (4, flat.numel()), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    )
    return [float(f"{value:.8g}") for value in (flat.norm(), *(signs @ flat))]


def arithmetic():
    """What decides the last bit of a sum here: torch's version, and what its kernels give for fixed input."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 37, 37, generator=generator)
    gram = x @ x.mT + torch.eye(37)
    results = [
        gram,
        torch.linalg.eigh(gram.double())[0],
        torch.linalg.cholesky(gram),
        gram.exp().sum(-1),
        x.softmax(-1),
    ]
    results.append((x.bfloat16() @ x.bfloat16()).float())
    digest = hashlib.sha256(b"".join(r.numpy().tobytes() for r in results)).hexdigest()
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {digest[:16]}"


def keys_of(state, prefix=""):
    """The names in a state dict, tensors with their shape and type."""
    if isinstance(state, dict):
        return [line for key in sorted(state, key=str) for line in keys_of(state[key], f"{prefix}/{key}")]
    if isinstance(state, torch.Tensor):
        return [f"{prefix} {list(state.shape)} {state.dtype}"]
    return [f"{prefix} {type(state).__name__}"]


def main():
    torch.set_num_threads(1)
    weights = {f"run: {name}": run(name) for name in CASES}
    weights |= {f"resume: {name}": save(name) for name in SAVED}
    found = {name: {"bits": {arithmetic(): bits(w)}, "probe": probe(w)} for name, w in weights.items()}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in found.items())
    FILE.write_text("{\n" + lines + "\n}\n", encoding="utf8")


if __name__ == "__main__":
    main()
