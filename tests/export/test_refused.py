"""Adapters that cannot be exported are refused with a reason, and no folder is left behind."""

import pytest
import tiny
from exporting import LLAMA, grit, start, train

from grit_optim import GritOptimizer, Site, export_adapter

REFUSED = {
    "DoRA": ({**LLAMA, "use_dora": True}, "uses DoRA, which divides by the norm"),
    "PiSSA": ({**LLAMA, "init_lora_weights": "pissa"}, "started with init_lora_weights='pissa'"),
    "untrained": (LLAMA, "no direction to save.*not been trained yet"),
}


@pytest.mark.parametrize(("config", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_adapters_that_cannot_be_exported(base_folder, tmp_path, config, message):
    model = start("fp32", config, base_folder)
    if message.startswith("started"):
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.data[:, 3:] = 0
    with pytest.raises(ValueError, match=message):
        export_adapter(model, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_dora_is_refused_by_the_optimizer_too(base_folder, tmp_path):
    model = start("fp32", {**LLAMA, "use_dora": True}, base_folder)
    optimizer = grit(model)
    train("fp32", model, optimizer)
    with pytest.raises(ValueError, match="uses DoRA"):
        optimizer.save_adapter(tmp_path / "a")
    with pytest.raises(ValueError, match="uses DoRA"):
        optimizer.shrink_()


def test_hand_written_lora_is_no_peft_adapter(tmp_path):
    model = tiny.HandWritten()
    sites = [Site.from_modules("layer", model.down, model.up, model.scaling)]
    optimizer = GritOptimizer(tiny.adamw(model), model, sites=sites)
    with pytest.raises(ValueError, match=r"holds no PeftModel.*state_dict"):
        optimizer.save_adapter(tmp_path)


def test_an_adapter_that_has_diverged_is_named(tmp_path):
    model = tiny.llama(layers=1)
    tiny.trained(model)[1].data.fill_(float("nan"))
    with pytest.raises(
        ValueError, match=r"infinite or NaN in 1 layer\(s\) \(model.layers.0.self_attn.q_proj\)"
    ):
        export_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())
