"""Data files, and the command, for the tests of `train`."""

import json

from public_rows import rows, write

from benchmarks.__main__ import main


def local_copies(folder, name, train=40, test=12):
    write(folder / f"{name}_train.jsonl", rows(name, 0, train))
    write(folder / f"{name}_test.jsonl", rows(name, 1000, test))
    return f"{name}={folder}"


SHORT = ["--steps", "4", "--warmup", "1", "--batch-size", "2", "--accumulation", "2", "--eval-examples", "6"]
FEW = [
    "--generate-examples",
    "2",
    "--max-new-tokens",
    "4",
    "--device",
    "cpu",
    "--threads",
    "1",
    "--rank",
    "4",
]


def train(model, dataset, out, *arguments, status=0):
    """Run the command, short; returns the metrics."""
    command = [
        "train",
        "--model",
        str(model),
        "--dataset",
        str(dataset),
        "--out",
        str(out),
        *SHORT,
        *FEW,
        *arguments,
    ]
    assert main(command) == status
    path = out / "metrics.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
