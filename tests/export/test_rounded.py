"""Adapters saved without an optimizer, at the rank of their product, or in another type."""

import bases
import pytest
import support
import tiny
import torch
from exporting import LLAMA, chosen, grit, start, train
from peft import PeftModel
from safetensors.torch import load_file

from grit_optim import export_adapter
from grit_optim.export.files import WEIGHTS


def test_an_adapter_of_any_optimizer_is_exported_as_it_is(base_folder, tmp_path):
    model = start("fp32", LLAMA, base_folder)
    train("fp32", model, tiny.adamw(model))
    report = export_adapter(model, tmp_path)
    assert set(report.values()) == {6}
    assert report.predicted_loss is None
    fresh = PeftModel.from_pretrained(bases.make("fp32", base_folder), tmp_path)
    assert torch.equal(bases.answer("fp32", fresh), bases.answer("fp32", model))


def test_tolerance_finds_the_rank_that_a_product_really_has(base_folder, tmp_path):
    model = start("fp32", LLAMA, base_folder)
    optimizer = grit(model, reprojection="two_sided", reprojection_freq=3, reprojection_k=2)
    train("fp32", model, optimizer)  # projected in its last step
    assert set(export_adapter(model, tmp_path / "rows").values()) == {6}, "no row is zero"
    report = export_adapter(model, tmp_path / "product", tolerance=1e-5)
    assert set(report.values()) == {2}
    fresh = PeftModel.from_pretrained(bases.make("fp32", base_folder), tmp_path / "product")
    assert (bases.answer("fp32", fresh) - bases.answer("fp32", model)).abs().max() < 1e-5
    with pytest.raises(ValueError, match="tolerance must be a share"):
        export_adapter(model, tmp_path, tolerance=1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_saved_in_another_type(base_folder, tmp_path, dtype):
    """Half the bytes, and what is loaded is the trained adapter rounded once."""
    model = start("fp32", {**LLAMA, "modules_to_save": ["norm"]}, base_folder)
    optimizer = grit(model)
    train("fp32", model, optimizer)
    optimizer.reduce_ranks_(chosen(optimizer, {"q_proj": 0}))
    optimizer.save_adapter(tmp_path / "whole")
    report = optimizer.save_adapter(tmp_path / "rounded", dtype=dtype)
    whole, rounded = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "rounded"))
    assert whole.keys() == rounded.keys()
    assert all(torch.equal(t.to(dtype), rounded[key]) for key, t in whole.items())
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if "lora_" in n), (
        "the model is left as it is"
    )
    assert report.as_dict() == optimizer.save_adapter(tmp_path / "whole").as_dict()
    sizes = [sum(t.numel() * t.element_size() for t in tensors.values()) for tensors in (whole, rounded)]
    assert sizes[1] * 4 == sizes[0] * torch.finfo(dtype).bits // 8
    fresh = PeftModel.from_pretrained(bases.make("fp32", base_folder), tmp_path / "rounded")
    worst = (bases.answer("fp32", fresh) - bases.answer("fp32", model)).abs().max()
    assert worst < 20 * torch.finfo(dtype).eps
    assert (worst > 1e-6) == (dtype != torch.float32)


def test_a_type_that_cannot_hold_the_adapter(base_folder, tmp_path):
    model = start("fp32", LLAMA, base_folder)
    optimizer = grit(model)
    train("fp32", model, optimizer)
    optimizer.save_adapter(tmp_path)
    before = load_file(tmp_path / WEIGHTS)
    support.sites(optimizer)[1].b.data[0, 0] = 1e5
    with pytest.raises(
        ValueError, match=r"float16 cannot hold values of .*k_proj.lora_B.weight \(at most 65504\)"
    ):
        optimizer.save_adapter(tmp_path, dtype=torch.float16)
    assert all(torch.equal(t, before[key]) for key, t in load_file(tmp_path / WEIGHTS).items())
    for wrong in (torch.int8, torch.float8_e4m3fn, "bf16"):
        with pytest.raises(ValueError, match="dtype must be one of"):
            export_adapter(model, tmp_path, dtype=wrong)
