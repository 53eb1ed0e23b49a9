"""The command line's recipes, the documents on them, and the table of several runs."""

import re

from finetuning import local_copies, train

from benchmarks.__main__ import main, make_parser
from benchmarks.core.files import REPOSITORY
from benchmarks.finetune import study


def parsed(*arguments):
    given = make_parser().parse_args(["train", "--model", "m", "--dataset", "d", "--out", "o", *arguments])
    study.fill_in(given)
    return given, study.make_config(given, "m", "d", "cpu")


def test_the_librarys_recipe_is_its_examples_configuration():
    given, config = parsed("--recipe", "library")
    assert (config.rank, config.alpha, config.dropout, config.target_modules) == (16, 32, 0.0, "all-linear")
    assert (config.batch_size, config.accumulation, config.lr, given.epochs) == (8, 4, 2e-5, 3)
    assert (config.clip, config.seed, config.optimizer, config.quantize) == (1.5, 42, "grit-paper", "none")


def test_the_studys_recipe_is_its_configuration():
    given, config = parsed("--recipe", "study", "--optimizer", "adamw8bit")
    assert (config.rank, config.alpha, config.dropout, config.quantize) == (16, 16, 0.0, "nf4")
    assert (config.batch_size, config.accumulation, config.steps, given.epochs) == (2, 4, 200, None)
    assert (config.lr, config.weight_decay, config.schedule, config.warmup) == (2e-4, 0.01, "linear", 5)
    assert (config.seed, config.optimizer) == (3407, "adamw8bit")


def test_what_is_given_goes_before_the_recipe():
    given, config = parsed("--recipe", "library", "--lr", "1e-3", "--steps", "7", "--rank", "8")
    assert (config.lr, config.steps, config.rank, config.alpha, given.epochs) == (1e-3, 7, 8, 32, None)
    _, config = parsed("--rank", "8")
    assert (config.alpha, config.weight_decay) == (8, 0.01)


def test_a_recipe_from_command_to_folder(tiny_model, tmp_path):
    out = tmp_path / "out"
    arguments = ["--recipe", "library", "--option", "kfac_min_samples=8", "--option", "kfac_update_freq=1"]
    metrics = train(tiny_model, local_copies(tmp_path, "alpaca-gpt4", train=60, test=8), out, *arguments)
    assert (metrics["config"]["max_length"], metrics["config"]["lr"]) == (192, 2e-5)
    assert metrics["telemetry"]["options"]["pairing"] == "paper"


def test_the_documents_defaults_are_the_ones_in_the_code():
    text = (REPOSITORY / "docs" / "finetune.md").read_text(encoding="utf-8")
    cells = {
        row[0]: row[1:]
        for row in re.findall(r"^\| (`--.+?) \| (.+?) \| (.+?) \| (.+?) \|$", text, re.MULTILINE)
    }
    columns = [parsed()[1], parsed("--recipe", "library")[1], parsed("--recipe", "study")[1]]
    for option in ("lr", "weight_decay", "quantize"):
        shown = [re.sub(r" \(.*", "", cell) for cell in cells[f"`--{option.replace('_', '-')}`"]]
        for cell, config in zip(shown, columns, strict=True):
            value = getattr(config, option)
            assert (cell if isinstance(value, str) else float(cell)) == value, option
    pairs = {
        "`--schedule`, `--warmup`": ("schedule", "warmup"),
        "`--batch-size`, `--accumulation`": ("batch_size", "accumulation"),
        "`--clip`, `--seed`": ("clip", "seed"),
    }
    for row, names in pairs.items():
        for cell, config in zip(cells[row], columns, strict=True):
            expected = [str(getattr(config, name)) for name in names]
            assert re.sub(r" \(.*", "", cell).split(", ") == expected, row


def test_report_takes_each_optimizer_at_its_best_rate(tiny_model, tmp_path, capsys, refusal):
    data, runs, found = local_copies(tmp_path, "dolly"), tmp_path / "runs", {}
    for optimizer in ("adamw", "grit"):
        for rate in ("1e-3", "1e-2", "1e-1"):
            arguments = ["--optimizer", optimizer, "--lr", rate, "--steps", "2", "--trainer", "loop"]
            metrics = train(tiny_model, data, runs / f"{optimizer}-{rate}", *arguments)
            found[optimizer, float(rate)] = metrics["curve"][-1]["loss"]
    capsys.readouterr()
    assert main(["report", str(runs)]) == 0
    said = capsys.readouterr().out
    rows = {line.split(" | ")[0].strip("| "): line for line in said.splitlines() if line.startswith("| ")}
    for optimizer, name in (("adamw", "adamw"), ("grit", "grit over adamw")):
        best = min((loss, rate) for (method, rate), loss in found.items() if method == optimizer)
        end = " (at the end of the rates)" if best[1] != 1e-2 else ""
        assert f"| {best[1]:g}{end} | {best[0]:.4f} (n=1) |" in rows[name]
    assert (runs / "table.md").read_text().strip() == said.strip()
    train(tiny_model, data, runs / "other", "--steps", "2", "--trainer", "loop", "--dropout", "0.1")
    assert "differ in dropout; only alike ones can be compared" in refusal(["report", str(runs)])
