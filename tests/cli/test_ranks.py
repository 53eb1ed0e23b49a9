"""`python -m grit_optim ranks`, the command that reads saved adapters."""

import json

import pytest
import tiny
from safetensors.torch import load_file, save_file

from grit_optim.__main__ import main


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter")
    model = tiny.llama(rank=6)
    optimizer = tiny.grit(model, min_lora_rank=0)
    tiny.train(model, optimizer, 5)
    optimizer.reduce_ranks_(0.4)
    return path, optimizer.save_adapter(path), model


def layer(site_name):
    """The layer's name in the base model, as the file has it, from the site's name in the training model."""
    return site_name.removeprefix("base_model.model.").removesuffix(".default")


def test_the_command_prints_what_was_saved(adapter, capsys):
    path, saved, _ = adapter
    assert main(["ranks", str(path), "--json"]) == 0
    read = json.loads(capsys.readouterr().out)
    by_name = {site["name"]: site for site in read["sites"]}
    assert len(by_name) == 14
    for site in saved.as_dict()["sites"]:
        name = site.pop("name")
        for key, value in site.items():
            assert by_name[layer(name)][key] == pytest.approx(value), key
    assert main(["ranks", str(path)]) == 0
    table = capsys.readouterr().out
    assert f"{saved.parameters:,}" in table.splitlines()[-1]
    assert len(table.splitlines()) == 16


def test_the_command_reads_adapters_that_peft_wrote(adapter, tmp_path, capsys):
    adapter[2].save_pretrained(tmp_path)
    assert main(["ranks", str(tmp_path), "--json", "--threshold", "0.5"]) == 0
    read = json.loads(capsys.readouterr().out)
    assert {site["rank"] for site in read["sites"]} == {6}
    assert {site["predicted_loss"] for site in read["sites"]} == {None}
    effective = {site["name"]: site["entropy_rank"] for site in read["sites"]}
    for site in adapter[1].sites:
        if site.rank:
            assert effective[layer(site.name)] == pytest.approx(site.entropy_rank, rel=1e-3), (
                "zero rows count for nothing"
            )
        else:
            assert effective[layer(site.name)] is None


def spoilt(path, name, content):
    (path / name).write_bytes(content)


def without(path, ending):
    tensors = load_file(path / "adapter_model.safetensors")
    del tensors[next(name for name in tensors if name.endswith(ending))]
    save_file(tensors, path / "adapter_model.safetensors")


BAD = {
    "no adapter": (
        lambda path: (path / "adapter_model.safetensors").unlink(),
        "is no saved adapter: it has no adapter_model",
    ),
    "damaged": (lambda path: spoilt(path, "adapter_model.safetensors", b"xxxxxxxxxxxx"), "is damaged"),
    "ranks file": (lambda path: spoilt(path, "grit_ranks.json", b"[]"), "is not what save_adapter"),
    "incomplete ranks file": (
        lambda path: spoilt(path, "grit_ranks.json", b'{"format": 1, "sites": [{"name": "x"}]}'),
        "a site without parameters_before, predicted_loss, rank_before",
    ),
    "a pair without B": (
        lambda path: without(path, ".lora_B.weight"),
        "and no base_model.model.model.layers.0",
    ),
    "newer ranks file": (lambda path: spoilt(path, "grit_ranks.json", b'{"format": 99}'), "format 99"),
}


@pytest.mark.parametrize(("spoil", "message"), BAD.values(), ids=BAD.keys())
def test_what_cannot_be_read_is_said_in_one_line(adapter, tmp_path, capsys, spoil, message):
    for file in adapter[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    spoil(tmp_path)
    assert main(["ranks", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_a_diverged_adapter_has_ranks_and_no_spectrum(adapter, tmp_path, capsys):
    tensors = load_file(adapter[0] / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith("lora_A.weight"))
    save_file({**tensors, name: tensors[name] * float("nan")}, tmp_path / "adapter_model.safetensors")
    assert main(["ranks", str(tmp_path), "--json"]) == 0
    sites = json.loads(capsys.readouterr().out)["sites"]
    assert [site["entropy_rank"] is None for site in sites].count(True) == 1
    assert all(site["rank"] for site in sites)


def test_a_threshold_that_is_none(adapter, capsys):
    assert main(["ranks", str(adapter[0]), "--threshold", "1.5"]) == 2
    assert "--threshold must be in (0, 1]" in capsys.readouterr().err
