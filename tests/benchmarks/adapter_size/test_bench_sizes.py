"""Ways to a small adapter: what is saved is what was trained, peers follow their papers, the report."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.adapter_size import job as job_module
from benchmarks.adapter_size import measure, peers, report, ways
from benchmarks.adapter_size.job import Job, train_and_save
from benchmarks.adapter_size.measure import WAYS
from benchmarks.base_model.load import load_base_model
from benchmarks.core.files import BenchmarkError
from benchmarks.core.results import RunConfig
from benchmarks.tasks.objective import collate, evaluate
from benchmarks.tasks.task import Example, Task
from benchmarks.training.train import adapted_model

# The paper's recipe looks at what the last layer sees, which is the answers alone: 64 tokens until it
# projects.
WHOLE = 311_296  # parameters of the adapter at rank 16
CONFIG = RunConfig("naming", "", 1e-2, 0, steps=12, batch_size=12, eval_every=12)


def examples(count, seed, vocabulary=2048):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(4, vocabulary, (count, 9), generator=generator).tolist()
    return tuple(Example(tuple(tokens[:6]), tuple(tokens[6:])) for tokens in drawn)


@pytest.fixture(scope="module")
def task():
    return Task("naming", examples(12, 2), examples(4, 3), "f" * 64)


@pytest.fixture
def small_task(task, monkeypatch):
    monkeypatch.setattr(measure, "load_task", lambda name, tokenizer: task)


def job(task, folder, way, budget=0.5, **changes):
    return Job(replace(CONFIG, optimizer=way, **changes), {}, (budget,), task, folder)


@pytest.fixture
def seen(monkeypatch):
    """The model of the latest fit."""
    models = []
    for module in (job_module, ways, peers):
        real = module.fit
        monkeypatch.setattr(
            module, "fit", lambda j, m, *rest, real=real: (models.append(m), real(j, m, *rest))
        )
    return models


@pytest.mark.parametrize("way", WAYS)
def test_what_is_read_back_is_what_was_trained(task, tmp_path, seen, way):
    wanted = job(task, tmp_path, way)
    for name, budget, place in WAYS[way](wanted):
        point = measure.measure(place, wanted)
        in_bf16 = name.endswith("bf16")
        if not name.startswith("SVD"):  # which leaves the model as it was
            loss = evaluate(seen[-1], task.heldout).loss
            assert point["heldout"] == pytest.approx(loss, rel=1e-2 if in_bf16 else 1e-4), name
        assert point["bytes"] > (2 if in_bf16 else 4) * point["parameters"] > 0
        assert not in_bf16 or point["bytes"] < 3 * point["parameters"]
        slack = 1.2 if "AdaLoRA" in name else 1.01  # its budget counts directions, whatever their size
        assert budget is None or point["parameters"] <= slack * budget * WHOLE, name


def test_in_bf16_frozen_weights_are_in_bf16_and_the_adapter_is_not(task, tmp_path, seen):
    wanted = job(task, tmp_path, "adalora", precision="bf16", steps=2)
    ((_, _, place),) = peers.adalora(wanted)
    kinds = {("lora_" in name, parameter.dtype) for name, parameter in seen[-1].named_parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    assert measure.measure(place, wanted)["heldout"] > 0


def test_rounded_the_whole_adapter_has_half_its_bytes(task, tmp_path):
    whole = train_and_save(job(task, tmp_path, "whole"), adapted_model(CONFIG), "as it is")
    ((name, budget, place),) = ways.rounded(job(task, tmp_path, "rounded", budget=1.0))
    assert (name, budget) == ("grit, saved in bf16", 1.0)
    sizes = [(at / "adapter_model.safetensors").stat().st_size for at in (whole, place)]
    assert sizes[1] == pytest.approx(sizes[0] / 2, rel=0.01)


def test_ranks_are_the_nearest_to_the_share(task, tmp_path):
    ranks = [job(task, tmp_path, "rank").rank(budget) for budget in (0.75, 0.5, 0.49, 0.25, 0.01)]
    assert ranks == [12, 8, 8, 4, 1]


def test_adalora_ends_at_its_target_and_its_regularizer_is_pefts(task, tmp_path, seen):
    ((_, _, place),) = peers.adalora(job(task, tmp_path, "adalora"))
    kept = json.loads((place / "adapter_config.json").read_text())["rank_pattern"]
    assert len(kept) == 28
    assert sum(map(sum, kept.values())) == 28 * 8
    model, batch = seen[-1], collate(task.heldout)
    with_it, without = (
        m(input_ids=batch.tokens, labels=batch.tokens).loss
        for m in (model.base_model, model.get_base_model())
    )
    ours = peers.off_orthogonal(model, model.peft_config["default"].orth_reg_weight)
    assert (with_it - without).item() == pytest.approx(ours.item(), rel=1e-4)
    assert ours.item() > 0.01


def test_eva_starts_from_the_inputs_directions_and_gives_layers_different_ranks(task, tmp_path, seen):
    list(peers.eva(job(task, tmp_path, "eva", steps=2, lr=1e-9)))
    ranks = {n: p.shape[0] for n, p in seen[-1].named_parameters() if "lora_A" in n}
    assert sum(ranks.values()) <= 28 * 8
    assert len(set(ranks.values())) > 1
    rows = next(p for n, p in seen[-1].named_parameters() if "layers.0.self_attn.q_proj.lora_A" in n).detach()
    base, _ = load_base_model()
    tokens = collate(task.train).tokens
    hidden = base.model.layers[0].input_layernorm(base.model.embed_tokens(tokens))[tokens != 0]
    inside = (hidden @ rows.T).square().sum() / hidden.square().sum()
    random = torch.linalg.qr(torch.randn(256, len(rows)))[0]
    assert inside > 2 * (hidden @ random).square().sum() / hidden.square().sum()


def test_evas_adapter_is_in_fp32_on_a_base_in_bf16(task, tmp_path, seen):
    list(peers.eva(job(task, tmp_path, "eva", steps=2, precision="bf16")))
    assert {p.dtype for n, p in seen[-1].named_parameters() if "lora_" in n} == {torch.float32}


def test_a_run_too_short_for_projections_is_refused(task, tmp_path):
    few = job(replace(task, train=task.train[:6]), tmp_path, "two-sided", steps=1, batch_size=6)
    with pytest.raises(BenchmarkError, match="1 steps are too few for the paper's rules"):
        list(WAYS["two-sided"](few))


def test_a_run_for_each_way_budget_rate_and_seed_and_none_twice(small_task, tmp_path, capsys):
    arguments = (["whole", "rank"], [0.5, 0.25], [1e-2, 2e-2], [0], tmp_path, None)
    config = replace(CONFIG, steps=8)
    measure.adapter_sizes(config, *arguments)
    assert len(list(tmp_path.glob("sizes-naming-whole-*.json"))) == 2
    assert len(list(tmp_path.glob("sizes-naming-rank-*.json"))) == 4
    assert len(list(tmp_path.glob("*"))) == 6
    measure.adapter_sizes(config, *arguments)
    assert capsys.readouterr().out.count("is there already") == 6
    assert main(["report", str(tmp_path)]) == 0
    assert "0.01 of 0.01, 0.02" in (table := capsys.readouterr().out) or "0.02 of 0.01, 0.02" in table
    assert (tmp_path / "loss_against_bytes.png").stat().st_size > 10_000


def test_options_reach_grit_and_stand_in_the_ways_name(small_task, tmp_path):
    config = replace(CONFIG, steps=4, options={"min_lora_rank": 3})
    measure.adapter_sizes(config, ["budget"], [0.3], [1e-2], [0], tmp_path, None)
    ((series, _),) = report.read(tmp_path).values()
    assert list(series) == ["grit, rank_budget (min_lora_rank=3)"]


def test_an_option_that_grit_does_not_have_is_said_in_one_line(small_task, tmp_path, capsys):
    arguments = [
        "--ways",
        "budget",
        "--budgets",
        "0.5",
        "--steps",
        "4",
        "--option",
        "zzz=1",
        "--out",
        str(tmp_path),
    ]
    assert main(["sizes", *arguments]) == 2
    assert "GRIT cannot be built with --option as given" in capsys.readouterr().err
    assert main(["count", "--model", "tiny", "--option", "zzz=1", "--out", str(tmp_path)]) == 2
    assert "--optimizer grit cannot be built with --option as given" in capsys.readouterr().err


def write(folder, way, budget, seed, heldout, size, lr=1e-2, task="naming", **config):
    """A results file of one point."""
    settings = {**vars(CONFIG), "optimizer": way, "seed": seed, "lr": lr, "task": task, **config}
    settings["options"] = {"budgets": [budget]}
    point = {"way": way, "budget": budget, "bytes": size, "heldout": heldout, "parameters": size // 4}
    result = {"format": measure.FORMAT, "config": settings, "points": [point], "fingerprint": task}
    (folder / f"sizes-{task}-{way}-{budget}-{lr}-{seed}.json").write_text(json.dumps(result))


def test_each_way_is_shown_at_its_best_rate_and_compared_at_the_same_bytes(tmp_path):
    ours = report.OURS
    for seed in (0, 1):
        write(tmp_path, ways.WHOLE, 1.0, seed, 2.0 + seed, 1000)
        write(tmp_path, ours, 0.5, seed, 2.02 + seed, 500)
        write(tmp_path, "larger", 0.5, seed, 1.0, 600)
        write(tmp_path, "lower", 0.5, seed, 2.01 + seed, 510)
        write(tmp_path, "higher", 0.5, seed, 2.03 + seed, 490)
    write(tmp_path, "lower", 0.5, 0, 1.5, 510, lr=2e-2)
    write(tmp_path, "higher", 0.5, 0, None, 490, lr=2e-2)
    ((series, _),) = report.read(tmp_path).values()
    assert {p["lr"] for p in series["lower"][0.5]} == {2e-2}
    assert [p["seed"] for p in series["higher"][0.5]] == [0, 1]
    assert report.lower_ways(series, 0.5) == ["lower"]
    size, loss = report.against_whole(series, series[ours][0.5])
    assert size == -0.5
    assert loss == pytest.approx((0.01 + 0.02 / 3) / 2)
    text = report.table(report.read(tmp_path))
    assert "| higher | 0.01 of 0.01, 0.02; 0.9 | 0.5 | 490 | -51.0% |" in text
    assert "- rank_budget=0.5 (-50.0% bytes, +0.83% loss): lower lower" in text


def test_runs_of_different_lengths_are_not_mixed_and_tasks_are_kept_apart(tmp_path):
    write(tmp_path, "rank", 0.5, 0, 2.0, 500)
    write(tmp_path, "rank", 0.5, 0, 3.0, 500, task="prose")
    assert list(report.read(tmp_path)) == ["naming", "prose"]
    write(tmp_path, "rank", 0.5, 1, 2.0, 500, steps=13)
    with pytest.raises(BenchmarkError, match="mixes runs of naming"):
        report.read(tmp_path)


def test_unknown_ways_and_budgets_are_refused(capsys):
    assert main(["sizes", "--ways", "magic", "--out", "x"]) == 2
    assert "unknown way 'magic'" in capsys.readouterr().err
    assert main(["sizes", "--budgets", "1.5", "--out", "x"]) == 2
    assert "shares of the whole adapter" in capsys.readouterr().err


def test_the_figure_shows_adapters_that_are_better_than_the_whole_one(tmp_path, monkeypatch):
    write(tmp_path, ways.WHOLE, 1.0, 0, 2.0, 1000)
    write(tmp_path, report.OURS, 0.5, 0, 1.97, 500)
    drawn = []
    monkeypatch.setattr(report, "save", lambda drawing, path: drawn.append(drawing) or path)
    report.figure(report.read(tmp_path), tmp_path / "figure.png")
    low, high = drawn[0].axes[0].get_ylim()
    heights = [y for line in drawn[0].axes[0].get_lines() for y in line.get_ydata()]
    assert min(heights) == pytest.approx(-1.5)
    assert low < min(heights) < max(heights) < high
