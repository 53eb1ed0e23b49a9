"""Migration has a row for every knob of the earlier systems, and what a row points to exists."""

import ast
import inspect
import re

import pytest
import tiny
from pages import page, source_of_test
from pages import rows as rows_of

from grit_optim import GritOptimizer, presets

PAGE = page("docs/migration.md")
OPTIONS = set(GritOptimizer.__init__.__kwdefaults__)
ROWS = [cells for cells in rows_of(PAGE) if len(cells) == 5 and cells[0] not in ("theirs", "---")]

# Every knob that the earlier systems have, by where it is set there.
GRIT_CONFIG = {
    "kfac_update_freq": 50,
    "kfac_min_samples": 64,
    "kfac_damping": 1e-3,
    "kfac_inversion_device": "cpu",
    "grit_cov_update_freq": 15,
    "ng_warmup_steps": 0,
    "reprojection_freq": 50,
    "reprojection_k": 8,
    "use_two_sided_reprojection": True,
    "reprojection_warmup_steps": 0,
    "enable_rank_adaptation": True,
    "rank_adaptation_threshold": 0.99,
    "min_lora_rank": 4,
    "rank_adaptation_start_step": 0,
    "lambda_kfac": 1e-5,
    "lambda_reproj": 1e-4,
    "regularizer_warmup_steps": 0,
    "log_fisher_spectrum": True,
    "log_top_eigs": 8,
    "log_eigs_bar": True,
    "log_eig_heatmaps": True,
    "log_eig_heatmaps_modules": 6,
    "log_eff_rank_on_inversion": False,
    "log_final_eff_rank": True,
}
TRAINING = [
    "max_grad_norm",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "model_id",
    "dataset_name",
    "batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "num_epochs",
    "max_length",
    "precision",
    "num_workers",
    "pin_memory",
    "drop_last",
]
VLM = [
    "fisher_approximation",
    "enable_natural_gradient",
    "enable_projection",
    "fisher_update_freq",
    "projection_budget_start",
    "projection_budget_end",
    "r",
    "lora_alpha",
    "create_vlm_grit_adapter",
    "create_grit_trainer",
]
METHODS = [
    "GRITManager(model, config, device)",
    "GRITManager.step(loss)",
    "GRITManager.update_and_invert_factors",
    "GRITManager.precondition_gradients",
    "GRITManager.neural_reprojection",
    "GRITManager.factors_are_ready",
    "GritTrainer",
    "GritCallback",
    "GritOptimizer(optimizer, manager)",
    "KFACAutogradFunction",
    'report_to="wandb"',
]


def row_of(name):
    return next(cells for cells in ROWS if f"`{name}`" in cells[0])


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


@pytest.mark.parametrize("cells", ROWS, ids=[cells[0] for cells in ROWS])
def test_what_a_row_points_to_exists(cells):
    here, test = cells[2], cells[4]
    if here in ("yours", "not offered", "a hook on `lora_A`"):
        return
    name = here.strip("`")
    call = re.fullmatch(r"optimizer\.(\w+)\((?:(\w+)=.*)?\)", name)
    if call:
        keywords = inspect.signature(getattr(GritOptimizer, call[1])).parameters
        assert call[2] is None or call[2] in keywords
    elif name not in ("GritOptimizer(base, model)", "GritCallback", "optimizers=(optimizer, None)") and (
        not name.startswith("python -m grit_optim ")  # which test_pages.py runs
    ):
        option, _, value = name.partition("=")
        assert option in OPTIONS
        if value:
            needed = {"reprojection": "balanced"} if option.startswith("rank_") else {}
            tiny.grit(tiny.llama(layers=1), **{**needed, option: ast.literal_eval(value)}).close()
    assert test, "a row without a test behind it"


@pytest.mark.parametrize("test", sorted({cells[4] for cells in ROWS if cells[4]}))
def test_a_rows_test_exists(test):
    file, _, name = test.partition("::")
    assert f"def {name or 'test_'}" in source_of_test(file)
