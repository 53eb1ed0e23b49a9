"""Sinks: files of JSON lines, TensorBoard, Weights & Biases."""

import json
import math
import os
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import support
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from recording import recorded, rounded

from grit_optim import GritOptimizer, Site, sinks
from grit_optim.sinks.flattening import Flattener

BEGINNINGS = (b'{"kind": "start"', b'{"kind": "step"', b'{"kind": "end"')


def pair(model):
    return Site.from_modules("layer", model.down, model.up, model.scaling)


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


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(
    text=st.one_of(
        st.binary(min_size=1, max_size=60),
        st.text(min_size=1, max_size=40).map(str.encode),
        st.sampled_from(
            [
                b'{"loss": 1.23, "note": "everything I have"}',
                b'{"kind": "note", "text": "mine"}\n{"kind"',
                b"step,loss\n1,2.0\n",
                b"\n",
                b'["kind"]',
                b'{"kind": "starts"',
            ]
        ),
    )
)
def test_a_file_that_is_no_log_is_left_as_it_is(text):
    with TemporaryDirectory() as folder:
        path = Path(folder, "mine.json")
        path.write_bytes(text)
        if any(text.startswith(beginning) or beginning.startswith(text) for beginning in BEGINNINGS):
            return
        with pytest.raises(ValueError, match=r"is no log of GRIT's.*log to another file"):
            sinks.JsonLines(path)
        assert path.read_bytes() == text


@pytest.mark.parametrize(
    "text",
    [
        b'{"kind": "start",\n "a": 1\n}',
        b'{"kind": "start"}\nmy own notes',
        b'{"kind": "start"} and so on\n',
        b'{"kind": "start"}\n{"name": "me"',
    ],
)
def test_a_file_that_only_begins_or_ends_as_a_log_is_left_as_it_is(tmp_path, text):
    path = tmp_path / "file"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=r"is no log of GRIT's"):
        sinks.JsonLines(path)
    assert path.read_bytes() == text


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_whole_records_are_kept_whether_their_last_line_ends_or_not(tmp_path, end):
    path, records = tmp_path / "grit.jsonl", [b'{"kind": "start", "step": 0}', b'{"kind": "end", "step": 3}']
    path.write_bytes(b"\n".join(records) + end)
    sink = sinks.JsonLines(path)
    sink({"kind": "start"})
    sink.close()
    assert path.read_bytes().splitlines() == [*records, b'{"kind": "start"}']


@pytest.mark.parametrize("where", ["a folder", "below a file"])
def test_a_file_that_cannot_be_written_is_refused_before_the_run(tmp_path, where):
    model = tiny.HandWritten()
    optimizer = GritOptimizer(tiny.adamw(model), model, sites=[pair(model)])
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match=str(tmp_path)):
        optimizer.log_to(tmp_path if where == "a folder" else tmp_path / "file" / "new")
    assert (tmp_path / "file").read_text() == "mine"
    assert not model._forward_hooks


def test_two_writers_of_one_file_are_told(tmp_path):
    first = sinks.JsonLines(tmp_path / "run.jsonl")
    first({"kind": "start"})
    with pytest.warns(UserWarning, match=r"run\.jsonl is being written by another process, or by another"):
        second = sinks.JsonLines(tmp_path / "run.jsonl")
    second({"kind": "start"})
    for sink in (first, second):
        sink.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sinks.JsonLines(tmp_path / "run.jsonl").close()
        for _ in range(2):
            sinks.JsonLines(os.devnull).close()
    assert (tmp_path / "run.jsonl").read_text() == '{"kind": "start"}\n' * 2


class Failing:
    """A sink that raises where it is told to, and notes what it was given."""

    def __init__(self, at):
        self.at, self.seen = at, []

    def __call__(self, record):
        self.seen.append(record["kind"])
        if record["kind"] == self.at:
            raise ConnectionError("the tracking server is gone")

    def close(self):
        self.seen.append("closed")
        if self.at in ("close", "step"):
            raise ConnectionError("the tracking server is gone")


@pytest.mark.parametrize("warned", ["default", "error"])
@pytest.mark.parametrize("at", ["start", "step", "end", "close"])
def test_a_sink_that_fails_keeps_nothing_else_from_closing(at, warned):
    model = tiny.llama(layers=1)
    optimizer = tiny.grit(model, precondition="eigenbasis")
    before, failing, after = Failing(None), Failing(at), Failing(None)

    def told(call):
        """Whether the call warned, as a warning or as an error."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("error" if warned == "error" else "always", UserWarning)
            try:
                call()
            except UserWarning as error:
                return "tracking server is gone" in str(error)
        return any("tracking server is gone" in str(w.message) for w in caught)

    for sink in (before, failing, after):
        assert told(lambda sink=sink: optimizer.log_to(sink, every=1)) == (sink is failing and at == "start")
    assert told(lambda: tiny.train(model, optimizer, 1)) == (at == "step")
    assert told(optimizer.close) == (at in ("end", "close"))
    assert not any(m._forward_hooks for m in model.modules())
    assert all(sink.seen.count("closed") == 1 for sink in (before, failing, after))
    assert before.seen[-2:] == after.seen[-2:] == ["end", "closed"]
    with pytest.raises(RuntimeError, match="was closed"):
        optimizer.step()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full")
def test_a_full_disk_ends_the_log_and_not_the_run():
    model = tiny.llama(layers=1)
    optimizer = tiny.grit(model)
    with pytest.warns(UserWarning, match=r"JsonLines failed on the 'start' record.*No space left"):
        optimizer.log_to("/dev/full")
    tiny.train(model, optimizer, 2)
    optimizer.close()


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
