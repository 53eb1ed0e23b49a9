"""The model card of a trained adapter."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from .config import FinetuneConfig

_NAMES = {
    "loss": "loss (nats per answer token)",
    "perplexity": "perplexity",
    "accuracy": "accuracy",
    "final_number_exact_match": "exact match of the final number",
}
_METRICS = {"perplexity": "perplexity", "accuracy": "accuracy", "final_number_exact_match": "exact_match"}


def command_line(config: FinetuneConfig, dataset: str) -> str:
    """The command that repeats the run; options at their defaults are left out."""
    plain = FinetuneConfig(config.model, config.dataset, device=config.device)
    words = ["python", "-m", "benchmarks", "train", "--model", config.model, "--dataset", dataset]
    for name, value in vars(config).items():
        if name in ("model", "dataset", "device", "options") or value == getattr(plain, name):
            continue
        flag = f"--{name.replace('_', '-')}"
        words += [flag] if value is True else [flag, str(value)]
    for key, value in config.options.items():
        words += ["--option", f"{key}={value}"]
    return shlex.join([*words, "--out", "DIR"])


def _table(curve: list[dict[str, Any]]) -> str:
    before, after = curve[0], curve[-1]
    rows = [
        f"| {words} | {before[name]:.4f} | {after[name]:.4f} |"
        for name, words in _NAMES.items()
        if before.get(name) is not None and after.get(name) is not None
    ]
    return "\n".join(["| held out | before | after |", "| --- | --- | --- |", *rows])


def _front_matter(name: str, metrics: dict[str, Any], config: FinetuneConfig) -> str:
    """What Hugging Face reads, as YAML."""
    from huggingface_hub import EvalResult, ModelCardData

    hub, last = metrics["data"]["hub"], metrics["curve"][-1]
    found = {kind: last[key] for key, kind in _METRICS.items() if last.get(key) is not None}
    tags = ["lora", "grit" if config.optimizer.startswith("grit") else config.optimizer]
    data = ModelCardData(
        base_model=config.model,
        library_name="peft",
        pipeline_tag="text-generation",
        datasets=[hub] if hub else None,
        metrics=list(found),
        tags=[*tags, "qlora"] if config.quantize != "none" else tags,
        model_name=name,
        eval_results=[
            EvalResult(
                "text-generation",
                hub or config.dataset,
                config.dataset,
                kind,
                value,
                dataset_split="held out",
            )
            for kind, value in found.items()
        ],
    )
    return data.to_yaml()


def write(folder: Path, metrics: dict[str, Any], config: FinetuneConfig) -> None:
    """Write README.md: what Hugging Face reads in front, then what was trained, how, and what came out.

    Args:
        folder: the adapter's.
        metrics: what `metrics.json` holds.
        config: the run's.
    """
    from huggingface_hub import ModelCard

    name = f"{config.model.rpartition('/')[2]}-{config.dataset}-{config.optimizer}"
    base = f" over {config.base}" if config.optimizer.startswith("grit") else ""
    weights = "NF4" if config.quantize == "nf4" else config.precision
    batch = f"{config.batch_size} × {config.accumulation}"
    hardware = metrics["hardware"]["gpu"] or metrics["hardware"]["cpu"]
    versions = ", ".join(
        f"{package} {version}" for package, version in metrics["versions"].items() if version
    )
    text = f"""---
{_front_matter(name, metrics, config)}
---

# {name}

A LoRA adapter (rank {config.rank}, alpha {config.alpha}, {config.target_modules}) for `{config.model}`
with base weights in {weights}, trained on {config.dataset} with `{config.optimizer}`{base}
at a learning rate of {config.lr:g}: {config.steps} steps of {batch} examples.

{_table(metrics["curve"])}

{metrics["data"]["note"]}.

```bash
{command_line(config, metrics["data"]["argument"])}
```

`metrics.json` holds the whole curve and the settings. {hardware}; {versions}.
"""
    ModelCard(text).save(folder / "README.md")
