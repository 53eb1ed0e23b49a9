"""Several optimizers in turns on one model: they do not disturb each other, and what fails is named."""

import pytest
import torch

from benchmarks.core.files import BenchmarkError
from benchmarks.core.settings import Settings
from benchmarks.cost import kernels, lanes, on_shape
from benchmarks.cost.compare import Comparison, Plan, compare
from benchmarks.cost.lanes import Clock, Lane, Shared, take_turns
from benchmarks.cost.on_shape import cost_on_shape
from benchmarks.cost.shapes import Workload
from benchmarks.cost.tables import cost_table
from benchmarks.training.optimizers import make_optimizer

SMALL = Workload("tiny", rank=4, batch_size=1, length=16, accumulation=2)
SETTINGS = Settings(1e-3)
QUICK = Plan(steps=2, block=1, warmup=2)


@pytest.fixture(scope="module")
def shared():
    return Shared(SMALL)


def hooks_on(model):
    return sum(len(getattr(module, name)) for module in model.modules() for name in lanes.HOOKS)


def losses_alone(shared, name, steps):
    lane = Lane(shared, name, SETTINGS)
    losses = [lane.train_step() for _ in range(steps)]
    lane.close()
    return losses


@pytest.mark.parametrize("names", [("grit", "adamw"), ("adamw", "grit"), ("grit", "singd")])
def test_lanes_do_not_disturb_each_other(shared, names):
    if "singd" in names:
        pytest.importorskip("singd")
    alone = [losses_alone(shared, name, 6) for name in names]
    assert alone[0] != alone[1]
    here = []
    for name in names:
        here.append(Lane(shared, name, SETTINGS))
        here[-1].train_step()
        here[-1].pause()
    for lane in (here[0], here[1], here[1], here[0], here[1]):
        with lane.at_work():
            lane.train_step()
            lane.train_step()
    assert [here[0].losses, here[1].losses] == [alone[0][:5], [*alone[1], *here[1].losses[6:]]]
    assert len(here[1].losses) == 7
    for lane in here:
        lane.go_on()
        lane.close()


def test_hooks_are_off_while_others_work(shared):
    before = hooks_on(shared.model)
    lane = Lane(shared, "grit", SETTINGS)
    assert hooks_on(shared.model) >= before + 14
    lane.pause()
    assert hooks_on(shared.model) == before
    with lane.at_work():
        assert hooks_on(shared.model) >= before + 14
    lane.go_on()
    lane.close()
    assert hooks_on(shared.model) == before


def test_every_lane_starts_from_the_same_adapters(shared):
    starts = []
    for name in ("adamw", "grit"):
        lane = Lane(shared, name, SETTINGS)
        starts.append([p.detach().clone() for p in shared.parameters])
        lane.train_step()
        lane.close()
    assert all(torch.equal(a, b) for a, b in zip(*starts, strict=True))


def test_times_add_up(shared):
    lane = Lane(shared, "adamw", SETTINGS)
    for _ in range(3):
        lane.train_step()
    lane.close()
    for whole, passes, step in zip(lane.step_seconds, lane.pass_seconds, lane.optimizer_seconds, strict=True):
        assert 0 < step < passes + step <= whole < 1.5 * (passes + step) + 0.05


def test_the_clock_forgets_what_was_taken():
    clock = Clock("cpu")
    for _ in range(3):
        clock.mark()
    assert len(clock.take()) == 2
    assert clock.take() == []


# -------------------------------------------------------------------- turns


class Fake(Lane):
    """A lane that writes its name into a list."""

    def __init__(self, name, log, breaks_at=None, error=RuntimeError):
        self.name, self.log, self.breaks_at, self.error = name, log, breaks_at, error
        self.forget()

    def train_step(self):
        if len(self.step_seconds) == self.breaks_at:
            raise self.error("out of memory")
        self.log.append(self.name)
        self.step_seconds.append(1.0)
        return 0.0

    def pause(self):
        self.log.append("|")

    def go_on(self):
        pass


def turns(lanes, steps, block, warm=0, seconds=None):
    failures = {}
    done = take_turns(
        lanes, steps, block, warm, seconds, lambda lane, error: failures.update({lane.name: str(error)})
    )
    return done, failures, "".join(lanes[0].log)


def test_every_other_round_goes_backwards():
    log = []
    assert turns([Fake(name, log) for name in "ABC"], 5, 2) == (5, {}, "AA|BB|CC|CC|BB|AA|A|B|C|")


def test_warming_steps_are_not_timed():
    log = []
    lanes = [Fake(name, log) for name in "AB"]
    assert turns(lanes, 2, 2, warm=1)[2] == "AAA|BBB|"
    assert [len(lane.step_seconds) for lane in lanes] == [2, 2]


def test_a_lane_that_fails_is_left_out():
    log = []
    found = turns([Fake("A", log), Fake("B", log, breaks_at=1), Fake("C", log)], 3, 1)
    assert found == (3, {"B": "out of memory"}, "A|B|C|C||A|A|C|")


def test_a_stop_keeps_what_was_timed():
    log = []
    lanes = [Fake("A", log), Fake("B", log, breaks_at=2, error=KeyboardInterrupt)]
    assert turns(lanes, 5, 1) == (2, {}, "A|B|B|A|A||")
    assert [len(lane.step_seconds) for lane in lanes] == [3, 2]


def test_time_ends_after_a_pair_of_rounds():
    log = []
    assert turns([Fake(name, log) for name in "AB"], 9, 1, seconds=1e-9)[0] == 2


# -------------------------------------------------------------------- the comparison


def test_what_is_found_of_each(shared):
    outcome = compare(shared, ["adamw", "grit", "riemannian"], lambda name: SETTINGS, QUICK)
    assert outcome.failures == {}
    assert list(outcome.results) == ["adamw", "grit", "riemannian"]
    grit = outcome.results["grit"]
    assert grit["reference"] == "plain adamw"
    assert grit["timed_steps"] == 2
    assert outcome.results["adamw"]["ratio"] == {"q1": 1.0, "median": 1.0, "q3": 1.0}
    sizes = grit["optimizer_state_bytes"]
    assert sizes["optimizer"] > sizes["plain adamw"] > 2 * 4 * 4 * (64 + 64)
    memory = grit["memory"]
    assert (
        memory["optimizer"]["peak_bytes"]
        > memory["plain adamw"]["peak_bytes"]
        > memory["plain adamw"]["rest_bytes"]
    )
    found = grit["launched"]
    assert found["optimizer"]["step"]["operations"] > found["plain adamw"]["step"]["operations"] + 100
    # With so few tokens the taps leave everything to the step.
    assert found["optimizer"]["pass"]["operations"] == found["plain adamw"]["pass"]["operations"]
    assert set(grit["stage_seconds_per_step"]) >= {"capture", "fold", "refresh", "precondition", "base"}
    assert hooks_on(shared.model) == sum(len(own) for _, own in shared.hooks)


def test_what_fails_is_named_and_the_others_go_on(shared, monkeypatch, capsys):
    def make(name, model, settings):
        if name == "muon":
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return make_optimizer(name, model, settings)

    monkeypatch.setattr(lanes, "make_optimizer", make)
    outcome = compare(shared, ["adamw", "muon", "grit"], lambda name: SETTINGS, QUICK)
    assert outcome.failures == {"muon": "OutOfMemoryError: CUDA out of memory."}
    assert list(outcome.results) == ["adamw", "grit"]
    assert "muon failed" in capsys.readouterr().err
    monkeypatch.setattr(on_shape, "compare", lambda *given: Comparison({}, {"adamw": "no room"}))
    with pytest.raises(
        BenchmarkError, match="plain adamw failed, so there is nothing to compare with: no room"
    ):
        cost_on_shape(SMALL, ["grit"], QUICK, None)


def test_without_a_profiler_there_are_times_all_the_same(shared, monkeypatch, capsys):
    def fail(*given, **settings):
        raise RuntimeError("CUPTI_ERROR_INSUFFICIENT_PRIVILEGES")

    monkeypatch.setattr(kernels, "profiled", fail)
    result = compare(shared, ["adamw", "grit"], lambda name: SETTINGS, QUICK).results["grit"]
    assert result["launched"] == {"plain adamw": {}, "optimizer": {}}
    assert result["timed_steps"] == 2
    assert "grit: kernels could not be counted: RuntimeError: CUPTI" in capsys.readouterr().err
    row = cost_table([{**result, "model": "tiny", "hardware": {"gpu": "a GPU"}}]).splitlines()[2]
    assert row.endswith("| – | a GPU |")


def test_a_diverged_lane_is_no_result(shared):
    outcome = compare(
        shared, ["adamw", "grit-none"], lambda n: Settings(1e30 if n != "adamw" else 1e-3), QUICK
    )
    assert list(outcome.results) == ["adamw"]
    assert "diverged while it was timed" in outcome.failures["grit-none"]


def test_events_of_a_trace_are_counted_by_kind():
    kinds = ["kernel", "kernel", "gpu_memcpy", "cpu_op", "gpu_user_annotation", "cuda_runtime", None]
    events = [{"cat": kind} if kind else {} for kind in kinds]
    assert kernels.counted({"traceEvents": events}) == {"kernel": 2, "memcpy": 1, "memset": 0}


def test_the_devices_time_of_stages_is_read_from_a_trace():
    events = [
        {"cat": "gpu_user_annotation", "name": "grit::fold", "dur": 30},
        {"cat": "gpu_user_annotation", "name": "grit::capture", "dur": 5},
        {"cat": "gpu_user_annotation", "name": "grit::capture", "dur": 7},
        {"cat": "user_annotation", "name": "grit::capture", "dur": 1000},
        {"cat": "gpu_user_annotation", "name": "Optimizer.step#AdamW.step", "dur": 400},
    ]
    assert kernels.device_seconds({"traceEvents": events}) == pytest.approx({"fold": 30e-6, "capture": 12e-6})
