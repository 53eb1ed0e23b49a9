"""The documentation names every option, knob and column, and what it names exists."""

import ast
import inspect
import re
from pathlib import Path

import pytest
import tiny

from benchmarks.core.files import REPOSITORY
from benchmarks.fisher_distance import report as fisher_distance
from grit_optim import GritOptimizer, presets
from grit_optim.__main__ import COMMANDS

DOCS = REPOSITORY / "docs"
MIGRATION, TELEMETRY, MATHEMATICS = (
    (DOCS / f"{name}.md").read_text(encoding="utf8") for name in ("migration", "telemetry", "mathematics")
)
OPTIONS = {
    n: p for n, p in inspect.signature(GritOptimizer.__init__).parameters.items() if p.kind is p.KEYWORD_ONLY
}

# Every knob that the earlier systems have, by where it is set there.
GRIT_CONFIG = {
    "kfac_update_freq": 50, "kfac_min_samples": 64, "kfac_damping": 1e-3, "kfac_inversion_device": "cpu",
    "grit_cov_update_freq": 15, "ng_warmup_steps": 0, "reprojection_freq": 50, "reprojection_k": 8,
    "use_two_sided_reprojection": True, "reprojection_warmup_steps": 0, "enable_rank_adaptation": True,
    "rank_adaptation_threshold": 0.99, "min_lora_rank": 4, "rank_adaptation_start_step": 0, "lambda_kfac": 1e-5,
    "lambda_reproj": 1e-4, "regularizer_warmup_steps": 0, "log_fisher_spectrum": True, "log_top_eigs": 8,
    "log_eigs_bar": True, "log_eig_heatmaps": True, "log_eig_heatmaps_modules": 6, "log_eff_rank_on_inversion": False,
    "log_final_eff_rank": True,
}  # fmt: skip
TRAINING = [
    "max_grad_norm", "lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules", "model_id", "dataset_name", "batch_size",
    "gradient_accumulation_steps", "learning_rate", "num_epochs", "max_length", "precision", "num_workers", "pin_memory",
    "drop_last",
]  # fmt: skip
VLM = [
    "fisher_approximation", "enable_natural_gradient", "enable_projection", "fisher_update_freq", "projection_budget_start",
    "projection_budget_end", "r", "lora_alpha", "create_vlm_grit_adapter", "create_grit_trainer",
]  # fmt: skip
METHODS = [
    "GRITManager(model, config, device)", "GRITManager.step(loss)", "GRITManager.update_and_invert_factors",
    "GRITManager.precondition_gradients", "GRITManager.neural_reprojection", "GRITManager.factors_are_ready", "GritTrainer",
    "GritCallback", "GritOptimizer(optimizer, manager)", "KFACAutogradFunction", 'report_to="wandb"',
]  # fmt: skip


def rows():
    found = re.findall(r"^\| (.+?) \| (.*?) ?\| (.+?) \| (.*?) ?\| (.*?) ?\|$", MIGRATION, flags=re.MULTILINE)
    return [cells for cells in found if cells[0] not in ("theirs", "---")]


def row_of(name):
    return next(cells for cells in rows() if f"`{name}`" in cells[0])


@pytest.mark.parametrize("name", [*GRIT_CONFIG, *TRAINING, *VLM, *METHODS])
def test_every_knob_has_its_row(name):
    assert row_of(name)[2]


@pytest.mark.parametrize("name", [name for name in GRIT_CONFIG if not name.startswith("log_")])
def test_the_preset_has_the_knobs_default(name):
    """Under the name that its row gives, and that default is the one in the row."""
    _, default, here, _, _ = row_of(name)
    assert default.strip("'") == str(GRIT_CONFIG[name])
    option, _, value = here.strip("`").partition("=")
    expected = ast.literal_eval(value) if value else GRIT_CONFIG[name]
    assert presets.PAPER[option] == expected


@pytest.mark.parametrize("cells", rows(), ids=[cells[0] for cells in rows()])
def test_what_a_row_points_to_exists(cells):
    here, test = cells[2], cells[4]
    if here in ("yours", "not offered", "a hook on `lora_A`"):
        return
    name = here.strip("`")
    call = re.fullmatch(r"optimizer\.(\w+)\((?:(\w+)=.*)?\)", name)
    if call:
        keywords = inspect.signature(getattr(GritOptimizer, call[1])).parameters
        assert call[2] is None or call[2] in keywords
    elif name.startswith("python -m grit_optim "):
        assert name.rsplit(" ", 1)[-1] in {command.__name__.rsplit(".", 1)[-1] for command in COMMANDS}
    elif name not in ("GritOptimizer(base, model)", "GritCallback", "optimizers=(optimizer, None)"):
        option, _, value = name.partition("=")
        assert option in OPTIONS
        if value:
            model = tiny.llama(layers=1)
            tiny.grit(model, **{option: ast.literal_eval(value)}).close()
    assert test, "a row without a test behind it"


@pytest.mark.parametrize("test", sorted({cells[4] for cells in rows() if cells[4]}))
def test_a_rows_test_exists(test):
    file, _, name = test.partition("::")
    source = (Path(__file__).parent / f"{file}.py").read_text(encoding="utf8")
    assert f"def {name or 'test_'}" in source


def test_every_keyword_of_log_to_is_documented_with_its_default():
    keywords = {
        n: p.default
        for n, p in inspect.signature(GritOptimizer.log_to).parameters.items()
        if p.kind is p.KEYWORD_ONLY
    }
    documented = dict(re.findall(r"^\| `(\w+)` \| `?(\w+)`? \| .+ \|$", TELEMETRY, flags=re.MULTILINE))
    assert {n: str(d) for n, d in keywords.items()} == {n: documented.get(n) for n in keywords}


def test_every_column_and_total_of_a_record_is_documented():
    model, records = tiny.llama(layers=1), []
    optimizer = tiny.grit(model)
    optimizer.log_to(records.append, every=1, log_fisher_spectrum=True, log_eig_heatmaps=True)
    tiny.train(model, optimizer, 3)
    step = records[-1]
    assert len(step["sites"]) > 20
    named = set(re.findall(r"`(\w+)`", TELEMETRY))
    assert set(step["sites"]) - named == set()
    assert set(step) - {"kind", "sites"} - named == set()
    assert set(step["stage_seconds"]) - set(re.findall(r"\w+", TELEMETRY)) == set()


def test_the_fisher_table_is_the_one_that_was_measured():
    results = REPOSITORY / "benchmarks" / "results" / "fisher"
    if not results.exists():
        assert "*Not measured yet" in MATHEMATICS
        pytest.skip("python -m benchmarks.fisher_distance has not been run yet")
    measured = fisher_distance.table(fisher_distance.read(results / "fisher.json"))
    assert (results / "fisher.md").read_text(encoding="utf8") == measured
    assert measured.strip() in MATHEMATICS
    for kind in ("kfac", "diagonal", "block_diagonal", "ekfac"):
        assert f"| `{kind}` |" in MATHEMATICS


def test_links_lead_somewhere():
    for path in DOCS.glob("*.md"):
        links = [
            link
            for link in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf8"))
            if "://" not in link
        ]
        assert [link for link in links if not (path.parent / link).exists()] == [], path.name
