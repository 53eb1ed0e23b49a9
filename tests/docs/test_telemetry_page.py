"""Telemetry documents every keyword, column and total, and its code runs."""

import inspect
import re

import tiny
from pages import blocks, page, row

from grit_optim import GritOptimizer, sinks

PAGE = page("docs/telemetry.md")


def test_every_keyword_of_log_to_is_documented_with_its_default():
    parameters = inspect.signature(GritOptimizer.log_to).parameters.values()
    keywords = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert len(keywords) >= 5
    for name, default in keywords.items():
        assert row(PAGE, f"`{name}`")[1].strip("`") == str(default), name


def test_every_column_and_total_of_a_record_is_documented():
    model, records = tiny.llama(layers=1), []
    optimizer = tiny.grit(model)
    optimizer.log_to(records.append, every=1, log_fisher_spectrum=True, log_eig_heatmaps=True)
    tiny.train(model, optimizer, 3)
    step = records[-1]
    assert len(step["sites"]) > 20
    named = set(re.findall(r"`(\w+)`", PAGE))
    assert set(step["sites"]) - named == set()
    assert set(step) - {"kind", "sites"} - named == set()
    assert set(step["stage_seconds"]) - set(re.findall(r"\w+", PAGE)) == set()


def test_the_lines_on_the_taps_run():
    (code,) = [code for code in blocks(PAGE, "python") if "check_capture" in code]
    model = tiny.llama(layers=1)
    optimizer = tiny.grit(model)
    tiny.train(model, optimizer, 2)
    tiny.loss_of(model).backward()
    exec(compile(code, "docs/telemetry.md", "exec"), {"optimizer": optimizer})
    assert not any(module._forward_hooks for module in model.modules())


def test_the_lines_on_logging_run(tmp_path, monkeypatch, capsys):
    """All but the sinks that need a package of their own, which are shown to exist."""
    monkeypatch.chdir(tmp_path)
    code = next(code for code in blocks(PAGE, "python") if "log_to" in code)
    kept = [line for line in code.splitlines() if "sinks." not in line]
    assert set(re.findall(r"sinks\.(\w+)\(", code)) == {"TensorBoard", "WandB"}
    assert sinks.TensorBoard
    assert sinks.WandB
    model = tiny.llama(layers=1)
    optimizer = tiny.grit(model)
    before, after = (
        "\n".join(line for line in kept if ("log_to" in line) is wanted) for wanted in (True, False)
    )
    exec(compile(before, "docs/telemetry.md", "exec"), {"optimizer": optimizer})
    tiny.train(model, optimizer, 2)
    exec(compile(after, "docs/telemetry.md", "exec"), {"optimizer": optimizer})
    assert "step 1" in capsys.readouterr().out
    assert (tmp_path / "run.jsonl").stat().st_size > 0
    assert (tmp_path / "ranks.json").stat().st_size > 0
