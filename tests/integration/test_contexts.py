"""The caller's autocast, default dtype, default device and gradient mode change no bit of what we compute."""

import ast
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from pairs import assert_same, everything, loss_of, network, wrapped
from safetensors.torch import load_file

import grit_optim
from grit_optim.capture import gathered

MODES = {
    "spectral": {},
    "steer": {"fisher": "ekfac", "rank_budget": None, "rank_budget_steps": 0, "reprojection": "none"},
    "eigenbasis": {"lambda_kfac": 1e-3, "damping": "absolute"},
    "balanced": {"adaptive_schedule": True, "rank_budget": (0.6, 0.9)},
    "inverse": {"rank_budget_schedule": "adaptive"},
    "none": {},
}


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


CONTEXTS = {
    "autocast bf16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast fp16": lambda: torch.autocast("cpu", torch.float16),
    "default bf16": lambda: default_dtype(torch.bfloat16),
    "default fp16": lambda: default_dtype(torch.float16),
    "default fp64": lambda: default_dtype(torch.float64),
    "meta": lambda: torch.device("meta"),
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


def run(mode, context, folder):
    """All that an optimizer does, in a context. The model's own passes are outside: autocast is for them."""
    usual = {
        "reprojection": "balanced",
        "reprojection_freq": 2,
        "rank_budget": (1.0, 0.6),
        "rank_budget_steps": 3,
        "max_grad_norm": 1.0,
        **MODES[mode],
    }
    # A torch.device context reaches into AdamW too, which makes its step counter there.
    base, settings = torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9}
    model, told = network(), []

    def build():
        with context():
            return wrapped(model, base, settings, precondition=mode, **usual)

    def steps(optimizer, seeds):
        for seed in seeds:
            loss = loss_of(model, seed)
            loss.backward()
            with context():
                optimizer.observe(loss)
                optimizer.step()
                optimizer.zero_grad()

    optimizer = build()
    steps(optimizer, range(5))
    with context():
        state = optimizer.state_dict()
    optimizer = build()
    with context():
        optimizer.load_state_dict(state)
    steps(optimizer, range(5, 8))
    with context():
        report = optimizer.telemetry()
        report.pop("stage_seconds")
        told += [report, optimizer.ranks().as_dict(), optimizer.final_ranks()]
        if usual["reprojection"] == "balanced":
            told.append(optimizer.plan_ranks(0.5).as_dict())
            optimizer.reduce_ranks_(0.5)
            optimizer.shrink_()
        optimizer.save_adapter(folder, fold_scale=True)
    saved = load_file(folder / "adapter_model.safetensors")
    if usual["rank_budget"] is None:
        steps(optimizer, range(8, 9))
    with context():
        optimizer.close()
    return [told, saved, everything(model, optimizer)]


@pytest.mark.parametrize("mode", MODES)
def test_no_context_of_the_callers_changes_a_bit(mode, tmp_path):
    plain = run(mode, lambda: default_dtype(torch.float32), tmp_path / "plain")
    for name, context in CONTEXTS.items():
        assert_same(run(mode, context, tmp_path / name), plain, name)


CALLS = ("build", "backward", "step", "zero_grad", "state_dict", "load", "reduce", "shrink", "close")


def one_call_in(context, chosen, mode):
    """As `run`, with a single kind of call in the context, and sums that backward passes make."""
    often = {"reprojection": "balanced", "reprojection_freq": 2, "reprojection_k": 2}
    model = network()

    def around(call):
        return context() if call == chosen else nullcontext()

    def steps(seeds):
        for seed in seeds:
            loss = loss_of(model, seed)
            with around("backward"):
                loss.backward()
            with around("step"):
                optimizer.step()
            with around("zero_grad"):
                optimizer.zero_grad()

    with around("build"):
        optimizer = wrapped(model, torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9}, precondition=mode, **often)
    steps(range(3))
    with around("state_dict"):
        state = optimizer.state_dict()
    with around("load"):
        optimizer.load_state_dict(state)
    steps(range(3, 5))
    with around("reduce"):
        optimizer.reduce_ranks_(0.5)
    with around("shrink"):
        optimizer.shrink_()
    steps(range(5, 7))
    with around("close"):
        optimizer.close()
    return everything(model, optimizer)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("mode", ["spectral", "balanced"])
def test_a_context_around_one_call_is_gone_with_it(mode, call, monkeypatch):
    """What is made in inference mode cannot be written outside it, so nothing of ours is made in it."""
    monkeypatch.setattr(gathered, "PENDING_LIMIT", 0)
    plain = one_call_in(nullcontext, call, mode)
    for name in ("inference", "no_grad", "default fp64"):
        assert_same(one_call_in(CONTEXTS[name], call, mode), plain, name)


@pytest.mark.parametrize("context", CONTEXTS)
def test_sums_that_are_made_in_the_backward_pass_are_in_fp32(context, monkeypatch):
    """The model is in float64, which autocast leaves alone."""
    monkeypatch.setattr(gathered, "PENDING_LIMIT", 0)
    ends = []
    for around in (CONTEXTS[context], lambda: default_dtype(torch.float32)):
        model = network().double()
        optimizer = wrapped(model)
        loss = model(torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
        loss = loss.square().mean()
        with around():
            loss.backward()
        optimizer.step()
        ends.append(everything(model, optimizer))
    assert_same(*ends)


def test_the_base_steps_in_the_callers_context():
    seen = []

    class Base(torch.optim.SGD):
        def step(self, closure=None):
            seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))

    model = network()
    optimizer = wrapped(model, Base)
    for dtype in (torch.bfloat16, torch.float16):
        loss = loss_of(model, 0)
        with torch.autocast("cpu", dtype):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    optimizer.step()
    assert seen == [(True, torch.bfloat16), (True, torch.float16), (False, torch.bfloat16)]


CONSTRUCTORS = {
    *("zeros", "ones", "full", "empty", "tensor", "as_tensor", "scalar_tensor", "arange", "linspace"),
    *("logspace", "eye", "rand", "randn", "randint", "randperm"),
}


@pytest.mark.parametrize("path", sorted(Path(grit_optim.__file__).parent.rglob("*.py")), ids=lambda p: p.stem)
def test_every_tensor_that_is_made_names_its_dtype_and_device(path):
    unnamed = [
        f"{path.name}:{node.lineno}: torch.{node.func.attr} without {word}="
        for node in ast.walk(ast.parse(path.read_text(encoding="utf8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func.value) == "torch"
        and node.func.attr in CONSTRUCTORS
        for word in ("dtype", "device")
        if word not in {keyword.arg for keyword in node.keywords}
    ]
    assert unnamed == []
