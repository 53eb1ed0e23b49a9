"""A save that is interrupted leaves the adapter that was there."""

from pathlib import Path

import pytest
import tiny
from exporting import LLAMA, grit, start, train
from peft import LoraConfig

from grit_optim import export_adapter
from grit_optim.export import atomic_folder
from grit_optim.export.files import STALE_WEIGHTS


@pytest.mark.parametrize(
    "place", ["save_file", "save_pretrained", "carry_over", "flush", "take_the_place", "rename"]
)
@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two steps"])
def test_an_interrupted_save_leaves_the_good_adapter(base_folder, tmp_path, monkeypatch, place, exchange):
    model = start("fp32", LLAMA, base_folder)
    optimizer = grit(model)
    train("fp32", model, optimizer)
    optimizer.save_adapter(tmp_path / "a")
    (tmp_path / "a" / "notes.txt").write_text("mine")
    good = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    optimizer.reduce_ranks_(0.4)
    if not exchange:
        monkeypatch.setattr(atomic_folder, "exchange", lambda one, other: False)

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if place == "save_file":
            patch.setattr("safetensors.torch.save_file", fail)
        elif place == "save_pretrained":
            patch.setattr(LoraConfig, "save_pretrained", fail)
        elif place == "rename":
            rename, calls = Path.rename, []

            def fail_second(self, target):
                calls.append(target)
                if len(calls) == 2:
                    raise KeyboardInterrupt
                return rename(self, target)

            patch.setattr(Path, "rename", fail_second)
        else:
            patch.setattr(atomic_folder, place, fail)
        if place == "rename" and exchange:
            optimizer.save_adapter(tmp_path / "a")  # needs no rename
            return
        with pytest.raises(KeyboardInterrupt):
            optimizer.save_adapter(tmp_path / "a")
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == good
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    optimizer.save_adapter(tmp_path / "a")
    assert (tmp_path / "a" / "adapter_model.safetensors").stat().st_size < len(
        good["adapter_model.safetensors"]
    )
    assert (tmp_path / "a" / "notes.txt").read_text() == "mine"


def test_the_stale_weights_of_another_format_are_not_carried_over(base_folder, tmp_path):
    model = start("fp32", LLAMA, base_folder)
    train("fp32", model, tiny.adamw(model))
    (tmp_path / STALE_WEIGHTS).write_bytes(b"old")
    export_adapter(model, tmp_path)
    assert not (tmp_path / STALE_WEIGHTS).exists()
