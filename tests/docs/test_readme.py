"""The README's figures are those of the results files, and its code runs."""

import re
from types import SimpleNamespace

import peft
import pytest
import tiny
import torch
from evidence import (
    PEERS,
    RESULTS,
    TASKS,
    comparable,
    loss,
    main_table,
    part,
    read_results,
    sizes,
    suite_table,
    target,
)
from pages import blocks, page, row, rows, words

import grit_optim
from grit_optim import GritOptimizer

README = page("README.md")
PYTHON = blocks(README, "python")
REAL = "GSM8K"  # its column is held to the runs by test_real_model_page
COLUMNS = ["optimizer", *TASKS, REAL, "steps", "step time", "state"]


def suite_row(label):
    """The suite's row of a contender, by column."""
    return dict(zip(rows(main_table())[0], row(main_table(), label), strict=True))


def shown(label):
    """What the README's table shows of a contender."""
    found = suite_row(label)
    losses = [re.match(r"[\d.]+", found[f"{task}: loss"]).group() for task in TASKS]
    steps, time = found["steps to AdamW's best"], found["step time"]
    missed = re.search(r"not reached on (\d of \d)", steps)
    steps = f"missed on {missed.group(1)}" if missed else steps.partition(" (")[0]
    return [*losses, steps, time.partition(" (")[0], found["optimizer state"]]


def test_the_results_table_is_the_suites():
    suite = (PEERS / "table.md").read_text(encoding="utf8").strip()
    assert suite == suite_table()
    table = [cells for cells in rows(README) if len(cells) == len(COLUMNS)]
    assert table[0] == COLUMNS
    place = COLUMNS.index(REAL)
    first, best, muon, fresh_muon, grit = [cells[:place] + cells[place + 1 :] for cells in table[2:]]
    assert first[1:] == [*shown("adamw")[:5], "1.00×", *shown("adamw")[6:]]  # steps are timed against its own
    assert best[1:] == [f"{target(task):.3f}" for task in TASKS] + ["1.00×", "1.00×", shown("adamw-0.6")[-1]]
    assert muon[1:] == shown("muon")
    assert fresh_muon[1:] == shown("muon-0.6")
    assert grit[1:] == shown("grit")


def labels():
    """All contenders of the suite."""
    return [cells[0] for cells in rows(main_table())[2:]]


def test_the_peer_in_the_table_is_the_best_one():
    """Of all contenders that are not GRIT's own, by the mean over the tasks."""
    peers = [label for label in labels() if not label.startswith("grit")]
    means = {label: sum(loss(label, task) for task in TASKS) for label in peers}
    assert len(means) > 15
    assert min(means, key=means.get) == "muon-0.6"


def test_what_is_said_of_the_table():
    text, origin = words(README), suite_table().split("\n\n")[-1]
    assert "[All contenders](docs/results.md)" in text
    assert sum(1 for label in labels() if re.fullmatch(r"adamw(-[\d.]+)*", label)) == 4
    assert "AdamW, best of four settings of β" in text
    assert "full budget 60 steps of 48 examples, seeds 0, 1, 2;" in origin
    assert origin.count("(1 threads a run)") == origin.count("threads a run") > 0
    assert "A run is 60 steps of 48 examples in bf16 on one CPU core, with every" in text


def test_the_best_rate_is_adamws_or_twice_that():
    rates = part("Best learning rates:")
    grit, adamw = (list(map(float, row(rates, label)[1:])) for label in ("grit", "adamw"))
    assert {ours / theirs for ours, theirs in zip(grit, adamw, strict=True)} == {1.0, 2.0}
    assert "GRIT's best was AdamW's or twice that" in README


def test_the_figure_is_what_its_caption_says():
    (group,) = comparable(read_results(RESULTS / "main"))
    configs = [run["config"] for run in group[1]]
    assert {config["task"] for config in configs} == {"naming"}
    assert {config["seed"] for config in configs} == {0}
    assert len({config["lr"] for config in configs}) == 3
    assert "one task, one seed, each optimizer at its best of three learning rates" in words(README)
    assert README.count("(benchmarks/results/main/curves.png)") == 1


def test_the_cost_of_smaller_adapters():
    ours = "grit, saved in bf16"
    rounded = {
        task: sizes.against_whole(series, series[ours][0.75]) for task, (series, _) in _sizes("sizes_rounded")
    }
    halves = [sizes.against_whole(series, series[sizes.OURS][0.49])[1] for _, (series, _) in _sizes("sizes")]
    assert {f"{-size:.0%}" for size, _ in rounded.values()} == {"62%"}
    assert f"{100 * max(rise for _, rise in rounded.values()):.1f}" == "0.4"
    assert (f"{100 * min(halves):.1f}", f"{100 * max(halves):.1f}") == ("0.5", "1.4")
    text = words(README)
    assert "saved in bf16 were 62 % fewer bytes at no more than 0.4 % more loss" in text
    assert "half the parameters cost 0.5 to 1.4 %" in text


def _sizes(folder):
    found = sizes.read(RESULTS / folder).items()
    assert len(found) == 4
    return found


def test_the_loop_runs(capsys):
    (code,) = [code for code in PYTHON if "for batch in batches" in code]
    batches = [{"input_ids": ids, "labels": ids} for ids in (tiny.tokens(seed) for seed in range(3))]
    names = {"base_model": _base_model(), "batches": batches, "learning_rate": 1e-2}
    exec(compile(code, "README.md", "exec"), names)
    assert capsys.readouterr().out.split() == ["7"]


def _base_model():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=tiny.VOCABULARY, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def test_the_lines_on_smaller_adapters_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = [code for code in PYTHON if "plan_ranks" in code]
    lora = peft.LoraConfig(r=16, lora_alpha=16, target_modules="all-linear")
    model = peft.get_peft_model(_base_model(), lora)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = GritOptimizer(torch.optim.AdamW(trainable, lr=1e-2), model)
    tiny.train(model, optimizer, 4)
    exec(compile(code, "README.md", "exec"), {"optimizer": optimizer, "torch": torch})
    printed = capsys.readouterr().out.splitlines()
    assert float(printed[0]) > 0
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    whole = sum(p.numel() for p in trainable)
    assert weights.stat().st_size < 2 * 0.6 * whole + 4096  # bf16, half of the parameters, a header


def test_the_lines_for_a_trainer_name_what_exists():
    (code,) = [code for code in PYTHON if "for_trainer" in code]
    taken = []
    trainer = SimpleNamespace(model=tiny.llama(layers=1))
    names = {
        "Trainer": lambda *args, **keywords: taken.append(keywords) or trainer,
        "model": trainer.model, "arguments": None, "dataset": None, "optimizer": "ours",
        "grit_optim": grit_optim, "learning_rate": 1e-2,
    }  # fmt: skip
    exec(compile(code, "README.md", "exec"), names)
    assert taken == [{"train_dataset": None, "optimizers": ("ours", None)}]
    assert isinstance(trainer.optimizer, GritOptimizer)
    assert trainer.optimizer.param_groups[0]["lr"] == 1e-2


def test_the_qlora_recipe_runs(tmp_path):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    _base_model().save_pretrained(tmp_path / "base")
    (code,) = [code for code in PYTHON if code.startswith("# qlora\n")]
    assert code.count("bf16=True") == 1
    # The Trainer wants to be told that a CPU is no accident, and would report to whatever is installed.
    code = code.replace("bf16=True", 'bf16=True, use_cpu=True, report_to="none"')
    examples = [{"input_ids": ids, "labels": ids} for ids in tiny.tokens(0, batch=32)]
    names = {"model_id": str(tmp_path / "base"), "dataset": examples, "output_dir": str(tmp_path / "out")}
    names["learning_rate"] = 1e-2
    exec(compile(code, "README.md", "exec"), names)
    told = names["optimizer"].telemetry(per_site=False)
    assert (told["steps"], told["engaged_sites"]) == (4, 7)
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_the_options_to_set_work():
    (options,) = re.findall(r"Or set `([^`]*)`", README)
    keywords = eval(f"dict({options})")
    assert keywords["rank_budget"] == 0.5
    model = tiny.llama(layers=1)
    optimizer = tiny.grit(model, min_lora_rank=0, reprojection_freq=1, **keywords)
    tiny.train(model, optimizer, 2)
    assert optimizer.ranks().parameters <= 0.5 * optimizer.ranks().parameters_before
