"""The layering: imports point down only, and importing the package loads torch and nothing heavier."""

import ast
import subprocess
import sys
from pathlib import Path

import grit_optim

ROOT = Path(grit_optim.__file__).parent
LAYERS = [
    {
        "_checks",
        "_warn",
        "buckets",
        "bypass",
        "folder",
        "hostcopy",
        "linalg",
        "presets",
        "sites",
        "spectra",
        "wrapper",
    },
    {
        *{
            "budget",
            "curvature",
            "fisher",
            "held",
            "moments",
            "pairs",
            "precondition",
            "rank",
            "regularizers",
        },
        *{"reprojection", "schedule", "transport"},
    },
    {
        *{
            "adapter_config",
            "capture",
            "checkpoint",
            "diagnosis",
            "export",
            "losses",
            "pace",
            "processes",
            "ranks",
        },
        *{"recording", "shrink", "sinks", "snapshot", "telemetry"},
    },
    {"stages"},
    {"tapping"},
    {"ranked"},
    {"reporting"},
    {"optimizer"},
    {"trainer"},
    {"__init__", "callback", "figures", "runs"},
    {"plot", "ranks_command", "watch"},
    {"__main__"},
]
# Within a layer, which modules may use which: an entry here is a decision, not an accident.
BESIDE = {
    ("buckets", "sites"),
    ("bypass", "_warn"),
    ("bypass", "sites"),
    ("capture", "telemetry"),
    ("curvature", "fisher"),
    ("curvature", "moments"),
    ("export", "adapter_config"),
    ("export", "ranks"),
    ("shrink", "adapter_config"),
    ("figures", "runs"),
    ("held", "curvature"),
    ("pairs", "curvature"),
    ("pairs", "rank"),
    ("pairs", "reprojection"),
    ("pairs", "transport"),
    ("recording", "sinks"),
    ("recording", "snapshot"),
    ("snapshot", "telemetry"),
    ("spectra", "linalg"),
    ("presets", "_checks"),
    ("precondition", "curvature"),
    ("precondition", "held"),
    ("precondition", "pairs"),
    ("precondition", "reprojection"),
    ("precondition", "transport"),
    ("regularizers", "curvature"),
    ("regularizers", "rank"),
    ("reprojection", "fisher"),
    ("reprojection", "rank"),
    ("transport", "reprojection"),
}


def imported(path):
    """Modules of the package that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "grit_optim":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("grit_optim."):
            yield node.module.split(".")[1]


def test_every_module_has_a_layer():
    assert {p.stem for p in ROOT.glob("*.py")} == set.union(*LAYERS)


def test_imports_point_down_only():
    height = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    edges = {(p.stem, name) for p in ROOT.glob("*.py") for name in imported(p)}
    assert len(edges) > 30
    wrong = {
        (a, b) for a, b in edges if height[b] > height[a] or (height[b] == height[a] and (a, b) not in BESIDE)
    }
    assert wrong == set()
    assert edges >= BESIDE, "an exception that nothing uses any more"


def test_only_one_module_issues_warnings():
    """A count of frames, written elsewhere, would be wrong after the next refactoring."""
    assert {p.stem for p in ROOT.glob("*.py") if "warnings.warn(" in p.read_text()} == {"_warn"}


def test_only_sites_and_export_know_peft():
    """PEFT's names for its attributes stand in one file, those of its tensors in another."""
    words = ("lora_embedding", "import peft\n", "from peft import", "lora_A.weight")
    knowing = {p.stem for p in ROOT.glob("*.py") if any(word in p.read_text() for word in words)}
    assert knowing == {"sites", "export", "ranks_command"}


def test_importing_loads_nothing_heavier_than_torch():
    heavier = [
        "peft",
        "transformers",
        "matplotlib",
        "rich",
        "tensorboard",
        "wandb",
        "bitsandbytes",
        "safetensors",
    ]
    code = "import sys, grit_optim; print(sorted(set(sys.argv[1:]) & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code, *heavier], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
