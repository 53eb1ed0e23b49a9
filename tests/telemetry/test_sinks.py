"""Sinks: files of JSON lines, TensorBoard, Weights & Biases."""

import json
import math

import pytest
import support
import tiny
from recording import recorded, rounded

from grit_optim import sinks
from grit_optim.sinks.flattening import Flattener


def test_json_lines_append_so_that_a_resumed_run_goes_on(tmp_path):
    path = tmp_path / "deep" / "run.jsonl"
    for _ in range(2):
        model = tiny.llama()
        optimizer = tiny.grit(model)
        optimizer.log_to(path, every=1)
        tiny.train(model, optimizer, 2)
        optimizer.close()
    kinds = [json.loads(line)["kind"] for line in path.read_text().splitlines()]
    assert kinds == ["start", "step", "step", "end"] * 2


@pytest.mark.parametrize("whole", [b"", b'{"kind": "start"}\n'], ids=["only line", "last line"])
def test_a_line_that_was_cut_off_is_dropped(tmp_path, whole):
    path = tmp_path / "grit.jsonl"
    path.write_bytes(whole + b'{"kind": "st')
    sink = sinks.JsonLines(path)
    sink({"kind": "end"})
    sink.close()
    assert path.read_bytes() == whole + b'{"kind": "end"}\n'


def test_flattened_records_have_totals_and_sites():
    _, records, _ = recorded({}, log_fisher_spectrum=True, log_top_eigs=2)
    short, whole = Flattener(per_site=False), Flattener(per_site=True)
    for flatten in (short, whole):
        assert flatten(records[0]) == {}
    totals, sites = short(records[-2]), whole(records[-2])
    column = records[-2]["sites"]["effective_rank_a"]
    assert totals["GRIT/effective_rank_a/min"] == min(column)
    assert totals["GRIT/effective_rank_a/max"] == max(column)
    assert not any(tag.startswith("Fisher/") for tag in totals)
    name = records[0]["sites"][3]["name"]
    assert sites[f"Fisher/{name}/effective_rank_a"] == column[3]
    assert sites[f"Fisher/{name}/eig_g_1"] == records[-2]["sites"]["eigenvalues_g"][3][1]
    assert short(records[-1])[f"Fisher/{name}/final_k_a"] == 4
    assert all(math.isfinite(value) for value in sites.values())


def test_tensorboard_gets_the_scalars(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    model = tiny.llama()
    optimizer = tiny.grit(model)
    optimizer.log_to(sinks.TensorBoard(tmp_path, per_site=True), every=2)
    losses = tiny.train(model, optimizer, 4)
    optimizer.close()
    events = reader.EventAccumulator(str(tmp_path))
    events.Reload()
    seen = [(event.step, event.value) for event in events.Scalars("GRIT/loss")]
    assert seen == [(1, rounded(losses[0])), (2, rounded(losses[1])), (4, rounded(losses[3]))]
    assert f"Fisher/{support.sites(optimizer)[0].name}/trace_g" in events.Tags()["scalars"]


def test_weights_and_biases_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    model = tiny.llama()
    optimizer = tiny.grit(model)
    sink = sinks.WandB(project="GRIT", mode="offline", dir=str(tmp_path))
    logged, log = [], sink.run.log
    monkeypatch.setattr(sink.run, "log", lambda row: (logged.append(row), log(row)))
    optimizer.log_to(sink, every=2)
    tiny.train(model, optimizer, 4)
    optimizer.finish_logging()
    assert dict(sink.run.config)["grit"]["precondition"] == "spectral"
    assert [row["GRIT/step"] for row in logged] == [1, 2, 4, 4]
    assert logged[2]["GRIT/engaged_sites"] == 14
    assert logged[3][f"Fisher/{support.sites(optimizer)[0].name}/final_k_a"] == 4
    written = next(tmp_path.rglob("*.wandb")).read_bytes()
    assert b"GRIT/engaged_sites" in written
    assert b"final_k_a" in written
    assert wandb.run is None, "a run that was started here is ended here"
