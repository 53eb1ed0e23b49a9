"""The page on vision-language models: its ten lines run, and each row of the migration does what it says."""

import ast

import peft
import pytest
import tiny
import torch
import vlm
from pages import blocks, page, rows, source_of_test
from support import mode, sites

from grit_optim import GritOptimizer

PAGE = page("docs/vlm.md")
TESTED = [cells for cells in rows(PAGE) if cells[-1].startswith("test_")]


@pytest.mark.parametrize("cells", TESTED, ids=[cells[0] for cells in TESTED])
def test_a_rows_test_exists(cells):
    file, name = cells[-1].split("::")
    tree = ast.walk(ast.parse(source_of_test(file)))
    assert name in {node.name for node in tree if isinstance(node, ast.FunctionDef)}


@pytest.mark.filterwarnings("ignore")
def test_the_ten_lines_run(tmp_path):
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("trl")
    pytest.importorskip("accelerate")
    from PIL import Image

    vlm.plain().save_pretrained(tmp_path / "model")
    vlm.processor().save_pretrained(tmp_path / "model")
    messages = [{"role": "user", "content": "w1"}], [{"role": "assistant", "content": "w2 w3"}]
    picture = {"images": [Image.new("RGB", (8, 8), (9, 200, 30))]}
    row = {**picture, "prompt": messages[0], "completion": messages[1]}
    (code,) = [code for code in blocks(PAGE, "python") if code.startswith("# vlm")]
    assert len([line for line in code.splitlines() if line and "import" not in line]) <= 12
    # without a GPU
    code = code.replace("SFTConfig(output_dir,", "SFTConfig(output_dir, use_cpu=True, bf16=False,")
    names = {"model_id": str(tmp_path / "model"), "output_dir": str(tmp_path / "out")}
    names["dataset"] = datasets.Dataset.from_list([row] * 8)
    exec(code, names)
    assert names["optimizer"].telemetry(per_site=False)["steps"] == 6
    rates = [group["initial_lr"] for group in names["optimizer"].param_groups]
    assert rates == [5e-5, 1e-4, 2e-4], "vision, cross-modal, text"
    assert {site.modality for site in sites(names["optimizer"])} == {"vision", "cross_modal", "text"}


# -------------------------------------------------------------------- the rows of the migration


def grit(model=None, **options):
    model = model or vlm.adapted()
    return model, GritOptimizer(tiny.adamw(model, 1e-3), model, kfac_min_samples=2, **options)


def train(model, optimizer, steps):
    for seed in range(steps):
        model(**vlm.batch(seed=seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def test_lora_configuration():
    lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    _, optimizer = grit(peft.get_peft_model(vlm.plain(), lora))
    assert {(site.rank, site.scaling) for site in sites(optimizer)} == {(16, 2.0)}


def test_fisher_approximation():
    optimizer = train(*grit(fisher="diagonal"), 2)
    assert optimizer.curvature[0].moments.kind == "diagonal"


def test_no_natural_gradient():
    """The base, bit for bit."""
    model, optimizer = grit(precondition="none")
    train(model, optimizer, 2)
    other = vlm.adapted()
    train(other, tiny.adamw(other, 1e-3), 2)
    assert all(torch.equal(w, tiny.weights(other)[n]) for n, w in tiny.weights(model).items())
    assert mode(optimizer).name == "none"


def test_projection_budget():
    options = {"rank_budget": (0.33, 1.0), "rank_budget_steps": 6, "reprojection_freq": 2, "min_lora_rank": 1}
    model, optimizer = grit(reprojection="balanced", **options)
    train(model, optimizer, 1)
    before = optimizer.ranks().parameters
    train(model, optimizer, 8)
    after = optimizer.ranks()
    assert before < 0.4 * after.parameters_before
    assert after.parameters == after.parameters_before


def test_empirical_rule():
    model, optimizer = grit(reprojection="balanced", rank_budget="effective", min_lora_rank=1)
    assert optimizer.options.ranks.effective_rank_factor == 1.2
    train(model, optimizer, 2)
    assert 1 <= min(optimizer.ranks().values()) < max(optimizer.ranks().values()) <= 4


def test_create_vlm_grit_adapter():
    model, optimizer = grit(peft.get_peft_model(vlm.plain(), peft.LoraConfig(target_modules="all-linear")))
    assert type(model).__name__ == "PeftModel"
    assert list(optimizer.ranks().by_modality()) == ["vision", "cross_modal", "text"]


def test_mixed_modal_fisher():
    optimizer = train(*grit(modality_weights="equal"), 2)
    assert float(optimizer.curvature[0].kinds.share[:, 1].max()) > 0


def test_training_arguments():
    model = vlm.adapted()
    optimizer = GritOptimizer(torch.optim.AdamW(tiny.trained(model), lr=2e-4), model, kfac_update_freq=10)
    assert optimizer.param_groups[0]["lr"] == 2e-4
    train(model, optimizer, 3)
    assert optimizer.telemetry(per_site=False)["refreshes"] == 1
