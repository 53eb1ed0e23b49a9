"""Every base optimizer: trains with curvature, resumes exactly, and is itself, bit for bit, without."""

import inspect
import warnings

import pytest
import support
import tiny
import torch
from torch import optim

from grit_optim import GritOptimizer
from grit_optim.base import moments


def of_torch(name, **settings):
    kind = getattr(optim, name, None)
    return None if kind is None else lambda model: kind(tiny.trained(model), **{"lr": 1e-2, **settings})


def of_bitsandbytes(name):
    def make(model):
        bitsandbytes = pytest.importorskip("bitsandbytes")
        kind = getattr(bitsandbytes.optim, name)
        small = {"min_8bit_size": 16} if "min_8bit_size" in inspect.signature(kind).parameters else {}
        return kind(tiny.trained(model), lr=1e-3 if "Lion" in name else 1e-2, **small)

    return make


def transformers_adafactor(model):
    transformers = pytest.importorskip("transformers")
    return transformers.optimization.Adafactor(
        tiny.trained(model), lr=1e-2, relative_step=False, scale_parameter=False, beta1=0.9
    )


def schedule_free(model):
    schedulefree = pytest.importorskip("schedulefree")
    return schedulefree.AdamWScheduleFree(tiny.trained(model), lr=1e-2)


def lora_plus(model):
    from peft.optimizers import create_loraplus_optimizer

    return create_loraplus_optimizer(model=model, optimizer_cls=optim.AdamW, lr=1e-2, loraplus_lr_ratio=4)


BASES = {
    "AdamW": of_torch("AdamW", foreach=False),
    "AdamW-foreach": of_torch("AdamW", foreach=True),
    "AdamW-fused": of_torch("AdamW", fused=True),
    "AdamW-amsgrad": of_torch("AdamW", amsgrad=True),
    "Adam": of_torch("Adam", weight_decay=0.01),
    "NAdam": of_torch("NAdam"),
    "RAdam": of_torch("RAdam"),
    "SGD-momentum": of_torch("SGD", momentum=0.9),
    "SGD-nesterov": of_torch("SGD", momentum=0.9, nesterov=True),
    "RMSprop": of_torch("RMSprop", lr=1e-3),
    "Adagrad": of_torch("Adagrad"),
    "Adafactor": of_torch("Adafactor"),
    "Adafactor-transformers": transformers_adafactor,
    "Muon": of_torch("Muon"),  # from torch 2.9 on
    "AdamW8bit": of_bitsandbytes("AdamW8bit"),
    "PagedAdamW8bit": of_bitsandbytes("PagedAdamW8bit"),
    "RMSprop-bitsandbytes": of_bitsandbytes("RMSprop"),
    "Lion8bit": of_bitsandbytes("Lion8bit"),
    "ScheduleFreeAdamW": schedule_free,
    "LoRA+": lora_plus,
}


def built(name, seed=0, **options):
    if BASES[name] is None:
        pytest.skip(f"torch {torch.__version__} has no {name}")
    model = tiny.llama(layers=1, seed=seed)
    base = BASES[name](model)
    into_training_mode(base)
    return model, GritOptimizer(base, model, **{"kfac_min_samples": 8, **options})


def into_training_mode(optimizer):
    if hasattr(optimizer, "train"):  # schedule-free swaps its copies of the weights for evaluation
        optimizer.train()


def loss(model):
    with torch.no_grad():
        return tiny.loss_of(model, 0).item()


@pytest.mark.parametrize("name", BASES)
def test_trains_and_resumes_exactly(name, tmp_path):
    model, optimizer = built(name)
    before = loss(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(GRIT|Grit).*")
        for _ in range(6):
            tiny.train(model, optimizer, 1)
        torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "run.pt")
        assert loss(model) < before
        assert optimizer.telemetry()["engaged_sites"] == 7
        states = torch.load(tmp_path / "run.pt", weights_only=True)
        fresh_model, fresh = built(name, seed=1)
        fresh_model.load_state_dict(states[0])
        fresh.load_state_dict(states[1])
        into_training_mode(fresh.base)
        assert tiny.train(fresh_model, fresh, 4, first=1) == tiny.train(model, optimizer, 4, first=1)
    ours, theirs = tiny.weights(fresh_model), tiny.weights(model)
    assert [n for n in ours if not torch.equal(ours[n], theirs[n])] == []


@pytest.mark.parametrize("name", BASES)
def test_is_itself_bit_for_bit_where_nothing_is_preconditioned(name):
    model, optimizer = built(name, precondition="none")
    plain = tiny.llama(layers=1)
    base = BASES[name](plain)
    into_training_mode(base)
    assert tiny.train(model, optimizer, 5) == tiny.train(plain, base, 5)
    ours, theirs = tiny.weights(model), tiny.weights(plain)
    assert [n for n in ours if not torch.equal(ours[n], theirs[n])] == []
    assert optimizer.telemetry()["folds"] == 5


def decaying(name):
    """A base of that name with a weight decay, by model and decay."""
    if name.startswith("bitsandbytes"):
        bitsandbytes = pytest.importorskip("bitsandbytes")
        return lambda p, decay: getattr(bitsandbytes.optim, name.split(".")[1])(
            p, lr=1e-2, weight_decay=decay
        )
    if name.startswith("transformers"):
        transformers = pytest.importorskip("transformers")
        relative = name.endswith("relative")
        return lambda p, decay: transformers.optimization.Adafactor(
            p,
            lr=None if relative else 1e-2,
            relative_step=relative,
            scale_parameter=relative,
            weight_decay=decay,
        )
    kind, *momentum = name.split("-")
    settings = {"momentum": 0.9} if momentum else {}
    return lambda p, decay: getattr(optim, kind)(p, lr=1e-2, weight_decay=decay, **settings)


@pytest.mark.parametrize("mode", ["spectral", "steer"])
@pytest.mark.parametrize(
    "name",
    [
        "AdamW",
        "Adam",
        "Adafactor",
        "SGD",
        "SGD-momentum",
        "RMSprop",
        "Adagrad",
        "bitsandbytes.Adam",
        "transformers.Adafactor",
        "transformers.Adafactor.relative",
    ],
)
def test_weight_decay_decays_whatever_the_base(name, mode):
    make, decay = decaying(name), 100.0 if name.endswith("relative") else 5.0
    norms = {}
    for way in ("plain", mode):
        for strength in (0.0, decay):
            model = tiny.llama(layers=1)
            optimizer = make(tiny.trained(model), strength)
            if way != "plain":
                optimizer = GritOptimizer(optimizer, model, precondition=mode, kfac_min_samples=8)
            tiny.train(model, optimizer, 15)
            norms[way, strength] = sum(p.detach().square().sum() for p in tiny.trained(model)).sqrt().item()
    plain, ours = norms["plain", decay] / norms["plain", 0.0], norms[mode, decay] / norms[mode, 0.0]
    assert plain < 0.9, "the base itself decays, or the test shows nothing"
    assert ours < 1 - 0.75 * (1 - plain)


def test_squares_that_bitsandbytes_keeps_first_are_no_average():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = tiny.llama(layers=1)
    base = bitsandbytes.optim.RMSprop(tiny.trained(model), lr=1e-3)
    tiny.train(model, base, 1)
    parameter = next(p for p in tiny.trained(model) if base.state[p]["state1"].any())
    assert moments.first_moment(base, parameter) is None
    assert moments.second_moment(base, parameter) is base.state[parameter]["state1"]


def test_the_bases_own_warm_up_sets_the_length():
    schedulefree = pytest.importorskip("schedulefree")
    model = tiny.llama(layers=1)
    base = schedulefree.AdamWScheduleFree(tiny.trained(model), lr=1e-2, warmup_steps=100)
    base.train()
    optimizer = GritOptimizer(base, model, kfac_min_samples=8)
    tiny.train(model, optimizer, 1)
    for seed in range(1, 5):
        before = tiny.weights(model)
        tiny.train(model, optimizer, 1, first=seed)
        rate = base.param_groups[0]["scheduled_lr"]
        assert 0 < rate < 1e-3
        for name, after in tiny.weights(model).items():
            assert (after - before[name]).square().mean().sqrt() < 1.5 * rate, name


def test_an_adam_that_finds_its_own_rate_says_how_long_a_step_is():
    peers = pytest.importorskip("pytorch_optimizer")
    model = tiny.llama(layers=1)
    optimizer = GritOptimizer(peers.DAdaptAdam(tiny.trained(model), lr=1.0), model, kfac_min_samples=8)
    assert optimizer.options.step_length == optimizer.options.direction_momentum == "base"
    before = tiny.weights(model)
    tiny.train(model, optimizer, 3)
    assert all((after - before[name]).abs().max() < 1e-2 for name, after in tiny.weights(model).items())


def test_lora_plus_keeps_its_two_rates():
    _, optimizer = built("LoRA+")
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {(rates[id(site.a)], rates[id(site.b)]) for site in support.sites(optimizer)} == {(1e-2, 4e-2)}


def test_schedule_free_changes_over_for_evaluation():
    """Its weights for training and for evaluation differ, and a trainer must be able to change it over."""
    model, optimizer = built("ScheduleFreeAdamW")
    tiny.train(model, optimizer, 4)
    training = tiny.weights(model)
    optimizer.eval()
    assert any(not torch.equal(training[n], w) for n, w in tiny.weights(model).items())
    optimizer.train()
    for name, value in tiny.weights(model).items():
        torch.testing.assert_close(value, training[name], rtol=1e-5, atol=1e-6)


def test_a_base_without_modes_has_none_to_pass_on():
    _, optimizer = built("AdamW")
    assert not hasattr(optimizer, "train")
    assert not hasattr(optimizer, "eval")


# -------------------------------------------------------------------- refused


class CPUOffloadOptimizer(optim.Optimizer):
    """As torchao's: copies gradients to the host while they come in, and steps there."""

    def __init__(self, params):
        super().__init__(params, {"lr": 1.0})


class LayerWiseDummyOptimizer(optim.Optimizer):
    """As transformers' for layerwise GaLore: its step does nothing."""

    def __init__(self, params):
        super().__init__(params, {"lr": 1.0})


class AdaLomo(optim.Optimizer):
    """Fuses its update with the backward pass."""

    def __init__(self, params):
        super().__init__(params, {"lr": 1.0})


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (optim.LBFGS, "several times per step"),
        (CPUOffloadOptimizer, "copies of the weights and gradients on the host"),
        (LayerWiseDummyOptimizer, "during the backward pass"),
        (AdaLomo, "during the backward pass"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_cannot_work_is_refused_with_a_reason(kind, reason):
    model = tiny.llama(layers=1)
    with pytest.raises(TypeError, match=f"{kind.__name__}.*{reason}"):
        GritOptimizer(kind(tiny.trained(model)), model)


def test_transformers_layerwise_optimizer_is_refused():
    transformers = pytest.importorskip("transformers")
    model = tiny.llama(layers=1)
    dummy = transformers.trainer_pt_utils.LayerWiseDummyOptimizer({})
    with pytest.raises(TypeError, match="during the backward pass"):
        GritOptimizer(dummy, model)
