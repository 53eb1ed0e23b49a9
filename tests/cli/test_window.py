"""The window onto a run: reading its file, the figures, the live view, the command line."""

import io
import json
import statistics
import subprocess
import sys

import pytest
import tiny

from grit_optim.__main__ import main
from grit_optim.cli import figures, watch
from grit_optim.cli.plot import plot
from grit_optim.cli.run_log import RunError, parse_name, read_run

pytest.importorskip("matplotlib")
rich_console = pytest.importorskip("rich.console")


def trained_run(path, steps=5, resume=None, **log):
    model = tiny.llama()
    optimizer = tiny.grit(model)
    if resume is not None:
        optimizer.load_state_dict(resume)
    optimizer.log_to(path, **{"every": 2, "log_fisher_spectrum": True, "log_eig_heatmaps": True, **log})
    tiny.train(model, optimizer, steps)
    state = optimizer.state_dict()
    optimizer.close()
    return state


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "run.jsonl"
    trained_run(path, log_eig_heatmaps_modules=2)
    return path


# -------------------------------------------------------------------- reading


def test_a_run_is_read_as_it_was_written(run_file):
    run = read_run(run_file)
    assert [step["step"] for step in run.steps] == [1, 2, 4, 5]
    assert len(run.sites) == 14
    assert (run.sites[0].layer, run.sites[0].projection, str(run.sites[13])) == (
        0,
        "q_proj",
        "layer 1 down_proj",
    )
    assert run.end["final"].keys() == {site["name"] for site in run.start["sites"]}


@pytest.mark.parametrize(
    ("name", "adapter", "layer", "projection"),
    [
        ("base_model.model.model.layers.12.self_attn.q_proj.default", "default", 12, "q_proj"),
        ("model.transformer.h.3.attn.c_attn.my.adapter", "my.adapter", 3, "c_attn"),
        ("encoder.block.7.layer.0.SelfAttention.q.default", "default", 7, "q"),
        ("vision.blocks.5.mlp.fc1.default", "default", 5, "fc1"),
        ("lm_head.default", "default", None, "lm_head"),
        ("hand", "", None, "hand"),
    ],
)
def test_names_say_layer_and_projection(name, adapter, layer, projection):
    parsed = parse_name(name, adapter)
    assert (parsed.layer, parsed.projection) == (layer, projection)


def test_a_line_that_is_being_written_is_left_for_later(run_file, tmp_path):
    lines = run_file.read_text().splitlines(keepends=True)
    path = tmp_path / "live.jsonl"
    path.write_text("".join(lines[:3]) + lines[3][:50])
    assert [step["step"] for step in read_run(path).steps] == [1, 2]


def test_a_resumed_run_goes_on_and_a_restarted_one_begins_anew(tmp_path):
    path = tmp_path / "run.jsonl"
    state = trained_run(path)
    trained_run(path, steps=3, resume=state)
    assert [step["step"] for step in read_run(path).steps] == [1, 2, 4, 5, 6, 8]
    trained_run(path, steps=2)
    assert [step["step"] for step in read_run(path).steps] == [1, 2]


UNREADABLE = [
    ("", "holds no record yet"),
    ("{]\n", "line 1 is no JSON"),
    ('{"kind": "step", "step": 1}\n', "does not begin with a start record"),
    ('{"loss": 3}\n', "line 1 is no record"),
    ("[1]\n", "line 1 is no record"),
]


@pytest.mark.parametrize(("text", "message"), UNREADABLE)
def test_what_is_no_run_is_told_so(tmp_path, text, message):
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(RunError, match=message):
        read_run(path)


def test_a_missing_file_is_told_so(tmp_path):
    with pytest.raises(RunError, match=r"cannot read .*nowhere\.jsonl"):
        read_run(tmp_path / "nowhere.jsonl")


# -------------------------------------------------------------------- figures


@pytest.mark.parametrize("kind", figures.FIGURES)
def test_every_figure_names_its_axes(run_file, kind):
    figure = figures.make(read_run(run_file), kind)
    shown = [axis for axis in figure.axes if axis.get_visible()]
    assert len(shown) >= 3
    texts = [t for axis in shown for t in (axis.get_xlabel(), axis.get_ylabel())] + [
        figure.get_supxlabel(),
        figure.get_supylabel(),
    ]
    assert sum(bool(text) for text in texts) >= 3
    figure.savefig(io.BytesIO(), format="png")


def test_the_spectrum_shows_the_median_share_of_the_trace(run_file):
    run = read_run(run_file)
    figure = figures.spectrum(run, "a")
    last, members = run.steps[-1]["sites"], [i for i, s in enumerate(run.sites) if s.projection == "v_proj"]
    panel = next(axis for axis in figure.axes if axis.get_title().startswith("v_proj"))
    expected = [
        statistics.median(last["eigenvalues_a"][i][k] / last["trace_a"][i] for i in members) for k in range(4)
    ]
    assert list(panel.lines[-1].get_ydata()) == pytest.approx(expected)
    assert len(panel.lines) == len(run.steps) - 1, "in the first step B is zero, and no token counts"
    assert panel.get_yscale() == "log"


def test_the_heatmap_shows_the_latest_effective_ranks(run_file):
    run = read_run(run_file)
    figure = figures.effective_rank(run)
    for axis, letter in zip(figure.axes, "ag", strict=False):
        shown = axis.images[0].get_array()
        assert shown.shape == (2, 7)
        for site, value in zip(run.sites, run.steps[-1]["sites"][f"effective_rank_{letter}"], strict=True):
            column = [t.get_text() for t in axis.get_xticklabels()].index(site.projection)
            assert shown[site.layer, column] == pytest.approx(value)


def test_gradients_show_the_median_over_sites(run_file):
    run = read_run(run_file)
    figure = figures.gradients(run)
    norms, updates, angles = figure.axes[:3]
    line = next(line for line in norms.lines if line.get_label() == "∇A")
    expected = statistics.median(run.steps[-1]["sites"]["gradient_norm_A"])
    assert line.get_ydata()[-1] == pytest.approx(expected)
    assert len(updates.lines) == 4
    assert max(max(line.get_ydata()) for line in angles.lines) <= 90


def test_ranks_show_the_mean_over_layers(run_file):
    run = read_run(run_file)
    figure = figures.ranks(run)
    line = next(line for line in figure.axes[1].lines if line.get_label() == "up_proj")
    members = [i for i, site in enumerate(run.sites) if site.projection == "up_proj"]
    expected = statistics.fmean(run.steps[-1]["sites"]["effective_rank_a"][i] for i in members)
    assert line.get_ydata()[-1] == pytest.approx(expected)


def test_a_mode_without_angles_still_has_its_norms(tmp_path):
    model = tiny.llama(layers=1)
    optimizer = tiny.grit(model, precondition="eigenbasis")
    optimizer.log_to(tmp_path / "run.jsonl", every=1)
    tiny.train(model, optimizer, 3)
    optimizer.close()
    written, left_out = plot(tmp_path / "run.jsonl")
    assert {path.stem for path in written} == {"effective_rank", "ranks", "gradients"}
    assert len(left_out) == 3
    assert "log_fisher_spectrum=True" in left_out[0]


# -------------------------------------------------------------------- the commands


def test_plot_writes_every_figure(run_file, tmp_path, capsys):
    assert main(["plot", str(run_file), "--out", str(tmp_path / "figures")]) == 0
    printed = capsys.readouterr().out.split()
    assert [f"{kind}.png" for kind in figures.FIGURES] == [path.rsplit("/", 1)[-1] for path in printed]
    assert all(
        (tmp_path / "figures" / f"{kind}.png").read_bytes().startswith(b"\x89PNG") for kind in figures.FIGURES
    )


def test_plot_writes_one_figure_as_pdf(run_file, tmp_path):
    assert main(["plot", str(run_file), "--out", str(tmp_path), "--only", "ranks", "--format", "pdf"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["ranks.pdf"]


def test_plot_says_what_is_missing(tmp_path, capsys):
    trained_run(tmp_path / "run.jsonl", log_fisher_spectrum=False)
    assert main(["plot", str(tmp_path / "run.jsonl"), "--only", "spectrum_a"]) == 2
    assert "record with optimizer.log_to(path, log_fisher_spectrum=True)" in capsys.readouterr().err
    assert main(["plot", str(tmp_path / "none.jsonl")]) == 2


def shown(run):
    console = rich_console.Console(file=io.StringIO(), width=120, color_system=None)
    console.print(watch.dashboard(run))
    return console.file.getvalue()


def test_the_live_view_tells_the_state(run_file):
    run = read_run(run_file)
    text, last = shown(run), run.steps[-1]
    assert "step 5 · ended" in text
    assert "14 of 14" in text
    loss = [step["loss"] for step in run.steps if step["loss"] is not None][-1]
    assert f"{loss:.4g}" in text
    median = statistics.median(
        last["sites"]["effective_rank_a"][i] for i, s in enumerate(run.sites) if s.projection == "k_proj"
    )
    assert f"{median:.3g}" in next(line for line in text.splitlines() if "k_proj" in line)
    shares = watch.time_shares(last)
    assert f"{sum(v for k, v in shares.items() if k != 'base'):.1%}" in text


def test_the_live_view_of_a_run_without_steps(run_file, tmp_path):
    path = tmp_path / "new.jsonl"
    path.write_text(run_file.read_text().splitlines(keepends=True)[0])
    assert "14 sites, no step yet" in shown(read_run(path))
    run = read_run(run_file)
    for step in run.steps:
        step["loss"] = None
    assert "call optimizer.observe(loss)" in shown(run)


def test_watch_ends_with_the_run(run_file, capsys):
    assert main(["watch", str(run_file), "--interval", "0.01"]) == 0
    assert main(["watch", str(run_file), "--once"]) == 0
    assert capsys.readouterr().out.count("step 5") == 2


def test_sparkline():
    assert watch.sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert watch.sparkline([3.0, 3.0]) == "▁▁"
    assert watch.sparkline(list(range(100)), width=2) == "▁█"


def test_the_module_is_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "grit_optim", "--help"], capture_output=True, text=True, check=True
    )
    assert "plot" in done.stdout
    assert "watch" in done.stdout


def test_records_are_plain_json(run_file):
    for line in run_file.read_text().splitlines():
        json.loads(line, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
