"""Which modality each pair belongs to: by the model's structure, by the user's word, and where it shows."""

import json

import peft
import pytest
import tiny
import torch
import vlm
from support import sites
from torch import nn

import grit_optim
from grit_optim import GritOptimizer, Site, for_trainer, modality_groups

# Per model, the number of linear layers of each part.
PARTS = {
    "llava": {"vision": 12, "cross_modal": 2, "text": 14},
    "qwen2.5-vl": {"vision": 10, "cross_modal": 2, "text": 14},
    "qwen3-vl": {"vision": 8, "cross_modal": 4, "text": 14},
    "idefics3": {"vision": 12, "cross_modal": 1, "text": 14},
    "smolvlm": {"vision": 12, "cross_modal": 1, "text": 14},
    "paligemma": {"vision": 15, "cross_modal": 1, "text": 14},
    "gemma3": {"vision": 15, "text": 14},  # its projector is no layer but a parameter
    "internvl": {"vision": 12, "cross_modal": 2, "text": 14},
    "mllama": {"vision": 18, "cross_modal": 5, "text": 17},  # a projector, four of cross-attention
    "phi4-multimodal": {"vision": 15, "audio": 9, "cross_modal": 6, "text": 8},
}


def grit(model, **options):
    return GritOptimizer(torch.optim.AdamW(tiny.trained(model), lr=1e-2), model, **options)


def counts(optimizer):
    found = {}
    for site in sites(optimizer):
        found[site.modality] = found.get(site.modality, 0) + 1
    return found


@pytest.mark.parametrize("name", vlm.MODELS)
def test_the_parts_are_found_in_the_models_structure(name):
    optimizer = grit(vlm.adapted(name))
    assert counts(optimizer) == PARTS[name]
    inside = [s.name for s in sites(optimizer) if s.modality == "text"]
    assert all(".layers." in place and "vision" not in place for place in inside)


def test_what_is_called_otherwise_is_found_all_the_same():
    """A model of one's own code: no name or class tells, only the configurations do."""
    model = vlm.plain()
    model.model.part_b, model.model.part_c = model.model.vision_tower, model.model.multi_modal_projector
    model.model.part_a = model.model.language_model
    for name in ("vision_tower", "multi_modal_projector", "language_model"):
        delattr(model.model, name)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    assert counts(grit(model)) == PARTS["llava"]


def test_an_encoder_that_the_configuration_does_not_mention_is_found_by_what_it_reads():
    """As Phi-3.5-vision holds a CLIP model in its embeddings."""
    encoder, projector = vlm.plain().model.vision_tower, nn.Linear(12, 16)
    model = tiny.llama().unload()
    model.model.pictures = nn.ModuleDict({"img": encoder, "up": projector})
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    assert counts(grit(model)) == {"vision": 12, "cross_modal": 1, "text": 14}


def test_an_output_layer_and_whole_layers_are_text():
    model = vlm.adapted(targets=["lm_head", "q_proj"])
    assert counts(grit(model)) == {"vision": 2, "text": 3}


@pytest.mark.parametrize("wrap", [torch.compile, lambda m: nn.ModuleList([m, tiny.llama()])])
def test_wrapped_models_and_models_beside_others(wrap):
    optimizer = grit(wrap(vlm.adapted()))
    assert {m: n for m, n in counts(optimizer).items() if m} == PARTS["llava"]
    assert counts(optimizer).get(None, 0) in (0, 14), "a text model beside it is no part of it"


def test_text_models_and_encoders_alone_have_no_modalities():
    assert counts(grit(tiny.llama())) == {None: 14}
    alone = peft.get_peft_model(vlm.plain().model.vision_tower, peft.LoraConfig(target_modules="all-linear"))
    assert counts(grit(alone)) == {None: 12}


# -------------------------------------------------------------------- the user's word


def test_a_mapping_overrides_the_structure_and_the_longest_name_decides():
    said = {"layers.1": "vision", "layers.1.mlp": "cross_modal"}
    optimizer = grit(vlm.adapted(), modality_of=said)
    by_name = {site.name: site.modality for site in sites(optimizer)}
    prefix = "base_model.model.model.language_model.layers"
    assert by_name[f"{prefix}.0.mlp.up_proj.default"] == "text"
    assert by_name[f"{prefix}.1.self_attn.q_proj.default"] == "vision"
    assert by_name[f"{prefix}.1.mlp.up_proj.default"] == "cross_modal"


def test_a_function_overrides_where_it_says_something():
    optimizer = grit(tiny.llama(), modality_of=lambda name: "vision" if ".0." in name else None)
    assert counts(optimizer) == {"vision": 7, None: 7}


def test_a_pair_that_is_unfrozen_later_knows_its_modality():
    model = vlm.adapted()
    parameters = tiny.trained(model)
    late = [p for n, p in model.named_parameters() if "vision_tower" in n and "lora_" in n]
    for parameter in late:
        parameter.requires_grad_(False)
    optimizer = GritOptimizer(torch.optim.AdamW(parameters, lr=1e-2), model, modality_of={"fc1": "text"})
    assert "vision" not in counts(optimizer)
    for parameter in late:
        parameter.requires_grad_(True)
    model(**vlm.batch()).loss.backward()
    optimizer.step()
    assert counts(optimizer) == {"vision": 10, "text": 16, "cross_modal": 2}


def test_hand_written_pairs_are_found_by_their_module_or_say_it_themselves():
    model = vlm.plain().requires_grad_(False)
    hand = tiny.HandWritten()
    model.model.vision_tower.extra = hand
    other = tiny.HandWritten()
    pairs = [
        Site.from_modules("one", hand.down, hand.up),
        Site.from_modules("two", other.down, other.up, modality="cross_modal"),
        Site.from_parameters("three", nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(5, 2))),
    ]
    parameters = [p for pair in pairs for p in (pair.a, pair.b)]
    optimizer = GritOptimizer(torch.optim.AdamW(parameters, lr=1e-2), model, sites=pairs)
    assert [site.modality for site in sites(optimizer)] == ["vision", "cross_modal", "text"]


WRONG = [
    (
        {"modality_of": {"vision_tower": "visual"}},
        ValueError,
        "says 'visual', which is none of vision",
    ),
    ({"modality_of": lambda name: "txt"}, ValueError, "did you mean 'text'"),
    ({"modality_of": {"vision_twoer": "vision"}}, ValueError, "did you mean 'vision_tower'"),
    ({"modality_of": "vision"}, TypeError, "a function from a layer's name to its modality"),
]


@pytest.mark.parametrize(("given", "error", "message"), WRONG)
def test_a_wrong_word_is_refused_and_leaves_no_hook(given, error, message):
    model = vlm.adapted()
    with pytest.raises(error, match=message):
        grit(model, **given)
    assert not any("Tap" in str(h) for m in model.modules() for h in m._forward_hooks.values())


def test_a_site_of_no_modality_is_refused():
    hand = tiny.HandWritten()
    with pytest.raises(ValueError, match="site 'x' says 'images'"):
        Site.from_modules("x", hand.down, hand.up, modality="images")


# -------------------------------------------------------------------- parameter groups


def test_groups_hold_every_trained_parameter_once_with_its_parts_settings():
    model = vlm.adapted()
    groups = modality_groups(model, vision={"lr": 1e-5}, cross_modal={"lr": 1e-3, "weight_decay": 0.0})
    assert [group["modality"] for group in groups] == ["vision", "cross_modal", "text"]
    assert [group.get("lr") for group in groups] == [1e-5, 1e-3, None]
    assert [len(group["params"]) for group in groups] == [24, 4, 28]
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in tiny.trained(model)}
    base = torch.optim.AdamW(groups, lr=1e-4)
    assert [group["lr"] for group in base.param_groups] == [1e-5, 1e-3, 1e-4]


def test_a_part_whose_rate_is_zero_stays_and_the_others_move():
    model = vlm.adapted()
    groups = modality_groups(model, vision={"lr": 0.0}, text={"lr": 1e-2})
    optimizer = GritOptimizer(torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.0), model, kfac_min_samples=2)
    before = tiny.weights(model)
    for seed in range(3):
        model(**vlm.batch(seed=seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, weight in tiny.weights(model).items() if not torch.equal(weight, before[name])}
    assert moved == {name for name in before if "vision_tower" not in name}


def test_for_trainer_takes_a_rate_for_each_part():
    optimizer = for_trainer(vlm.adapted(), lr=1e-4, vision={"lr": 1e-5}, text={"lr": 2e-4})
    assert [group["lr"] for group in optimizer.param_groups] == [1e-5, 1e-4, 2e-4]


def test_whole_models_have_groups_too():
    groups = modality_groups(vlm.plain("gemma3"), cross_modal={"lr": 1e-3})
    names = {id(p): n for n, p in vlm.plain("gemma3").named_parameters()}
    assert len(names) == sum(len(group["params"]) for group in groups)
    assert [len(group["params"]) for group in groups][1] == 2, "a projection that is a parameter, and a norm"


@pytest.mark.parametrize(
    ("make", "settings", "error", "message"),
    [
        (tiny.llama, {"vision": {"lr": 1}}, ValueError, "found no vision part in PeftModel.*not multimodal"),
        (vlm.adapted, {"audio": {"lr": 1}}, ValueError, "its parts are cross_modal, text, vision"),
        (vlm.adapted, {"vision": 1e-5}, TypeError, "vision must be settings of a parameter group"),
        (vlm.adapted, {"vison": {"lr": 1}}, TypeError, "vison"),
        (lambda: vlm.adapted(targets=["o_proj"]), {"vision": {"lr": 1}}, ValueError, "nothing to train"),
    ],
)
def test_groups_of_parts_that_are_not_there_are_refused(make, settings, error, message):
    with pytest.raises(error, match=message):
        grit_optim.modality_groups(make(), **settings)


# -------------------------------------------------------------------- where it shows


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An optimizer after three steps, and the log that it wrote."""
    model, path = vlm.adapted(), tmp_path_factory.mktemp("run") / "run.jsonl"
    optimizer = grit(model, kfac_min_samples=2)
    optimizer.log_to(path, every=1, log_fisher_spectrum=True)
    for seed in range(3):
        model(**vlm.batch(seed=seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.finish_logging()
    return optimizer, path


def test_telemetry_and_ranks_show_the_parts(trained, tmp_path):
    optimizer, _ = trained
    told = optimizer.telemetry()
    assert told["modalities"] == {
        part: {"sites": n, "engaged_sites": n, "ranks": 4 * n} for part, n in PARTS["llava"].items()
    }
    assert {site["modality"] for site in told["per_site"].values()} == PARTS["llava"].keys()
    report = optimizer.ranks()
    parts = report.by_modality()
    assert {part: len(sites.sites) for part, sites in parts.items()} == PARTS["llava"]
    assert sum(part.parameters for part in parts.values()) == report.parameters
    assert "\nvision: 12 sites" in report.table()
    optimizer.save_adapter(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "grit_ranks.json").read_text())
    assert {site["modality"] for site in saved["sites"]} == PARTS["llava"].keys()


def test_a_run_shows_the_parts_in_figures_and_in_the_terminal(trained, tmp_path):
    pytest.importorskip("matplotlib")
    rich = pytest.importorskip("rich.console")
    from grit_optim.cli import figures, watch
    from grit_optim.cli.plot import plot
    from grit_optim.cli.run_log import read_run

    run = read_run(trained[1])
    console = rich.Console(width=250, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(watch.dashboard(run))
    shown = console.export_text()
    assert "modality" in shown
    assert "vision q_proj" in shown
    assert "text q_proj" in shown
    axes = figures.make(run, "modalities").axes
    assert [line.get_label() for line in axes[0].lines] == ["vision", "cross_modal", "text"]
    assert "modalities" in figures.figures_of(run)
    written, left_out = plot(trained[1], tmp_path, only=["modalities"])
    assert ([path.name for path in written], left_out) == (["modalities.png"], [])


def test_text_models_show_nothing_new(tmp_path):
    optimizer = tiny.grit(tiny.llama())
    assert "modalities" not in optimizer.telemetry()
    assert "modality" not in json.dumps(optimizer.ranks().as_dict())
    assert not any("modality" in str(value) for value in optimizer.state_dict()["grit"]["origin"].values())
