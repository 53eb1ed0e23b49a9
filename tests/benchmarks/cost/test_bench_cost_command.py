"""The command `cost` on a shape: what it refuses, its files, its report, a time limit."""

import dataclasses
import json
import os
import signal

import pytest

from benchmarks.__main__ import main
from benchmarks.cost.lanes import Lane
from benchmarks.cost.report import holds, table
from benchmarks.cost.shapes import Workload

SMALL = Workload("tiny", rank=4, batch_size=1, length=16, accumulation=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model", "gpt"],
            "unknown model 'gpt'; known: embedded, llama-3-8b-shape, llama-3-70b-shape, "
            "llama-3.2-1b-shape, tiny",
        ),
        (["--model", "tiny", "--optimizers", "sgdx"], "unknown optimizer 'sgdx'"),
        (["--model", "tiny", "--task", "naming"], "--task is for the embedded model"),
        (["--length", "8"], "--length is for --model"),
        (["--no-checkpointing"], "--checkpointing is for --model"),
        (["--scale"], "--scale is for --model"),
        (["--model", "tiny", "--scale-tokens", "8"], "say what --scale varies"),
        (["--model", "tiny", "--quantize", "int3"], "invalid choice: 'int3'"),
        (["--model", "tiny", "--seconds", "0"], "is not a finite number above 0"),
    ],
)
def test_bad_arguments_are_named(arguments, message, refusal):
    assert message in refusal(["cost", *arguments])
    assert "unknown model 'gpt'" in refusal(["count", "--model", "gpt"])


SIZE = [
    "--rank",
    "4",
    "--batch-size",
    "1",
    "--length",
    "16",
    "--accumulation",
    "2",
    "--steps",
    "2",
    "--block",
    "1",
]
COST = ["cost", "--model", "tiny", *SIZE, "--threads", "1", "--device", "cpu"]


def test_files_and_report(tmp_path):
    pytest.importorskip("bitsandbytes")
    trace = tmp_path / "traces" / "t.json"
    assert (
        main([*COST, "--optimizers", "grit,riemannian", "--out", str(tmp_path), "--trace", str(trace)]) == 0
    )
    assert (
        main(
            [*COST, "--quantize", "nf4", "--base", "adamw8bit", "--no-checkpointing", "--out", str(tmp_path)]
        )
        == 0
    )
    paths = sorted(tmp_path.glob("cost-*.json"))
    assert [path.name for path in paths] == [
        "cost-tiny-2x16tokens-grit.json",
        "cost-tiny-2x16tokens-riemannian.json",
        "cost-tiny-nf4-2x16tokens-grit-over-adamw8bit.json",
    ]
    results = [json.loads(path.read_text()) for path in paths]
    assert [result["reference"] for result in results] == ["plain adamw", "plain adamw", "plain adamw8bit"]
    assert results[0]["workload"] == dataclasses.asdict(SMALL)
    assert results[2]["workload"]["checkpointing"] is False
    assert results[0]["hardware"]["threads"] == 1
    for name in ("adamw", "grit", "riemannian"):
        events = json.loads((tmp_path / "traces" / f"t-{name}.json").read_text())["traceEvents"]
        assert any("grit::precondition" in str(event.get("name")) for event in events) == (name == "grit")
    assert holds(tmp_path)
    assert main(["report", str(tmp_path)]) == 0
    text = (tmp_path / "table.md").read_text()
    assert text == table(tmp_path)
    assert "| tiny-2x16tokens | grit against plain adamw | " in text
    assert "| tiny-nf4-2x16tokens | grit against plain adamw8bit | " in text


def test_scaling_varies_tokens_then_layers(tmp_path):
    sweep = ["--scale", "--scale-tokens", "8,16", "--scale-layers", "1,2"]
    assert main([*COST, *sweep, "--optimizers", "grit", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("scaling-*.json")
    result = json.loads(path.read_text())
    sizes = [(p["axis"], p["tokens"], p["layers"], p["sites"]) for p in result["points"]]
    assert sizes == [("tokens", 8, 2, 14), ("tokens", 16, 2, 14), ("layers", 16, 1, 7), ("layers", 16, 2, 14)]
    assert all(set(p["results"]) == {"adamw", "grit"} for p in result["points"])
    assert main(["report", str(tmp_path)]) == 0
    assert path.with_suffix(".png").stat().st_size > 5000
    assert "| layers | 16 | 2 | 14 | " in (tmp_path / "table.md").read_text()


def test_a_time_limit_ends_the_command_with_what_was_timed(tmp_path, monkeypatch):
    """As `timeout` ends it: SIGTERM in the middle of the timing."""
    step, handler = Lane.train_step, signal.getsignal(signal.SIGTERM)

    def limited(lane):
        if len(lane.step_seconds) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(lane)

    monkeypatch.setattr(Lane, "train_step", limited)
    try:
        assert main([*COST, "--steps", "50", "--out", str(tmp_path)]) == 0
    finally:
        signal.signal(signal.SIGTERM, handler)
    (path,) = tmp_path.glob("cost-*.json")
    assert json.loads(path.read_text())["timed_steps"] == 7
