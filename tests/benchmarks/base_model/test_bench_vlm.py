"""The embedded model that reads pictures: its training, its file, its record, and Muon in fp32."""

import json

import pytest
import torch

from benchmarks.base_model import pretrain_vlm, vlm
from benchmarks.base_model.icons import MATERIAL, PIXELS, icons
from benchmarks.base_model.muon import Muon, orthogonalized
from benchmarks.core.files import BenchmarkError

SMALL = pretrain_vlm.VlmPretrainConfig(steps=2, encoder_steps=2, batch_size=4, encoder_batch_size=4)


@pytest.fixture
def few(monkeypatch):
    """Forty icons in place of all of them."""
    monkeypatch.setattr(pretrain_vlm, "icons", lambda of: icons(of)[:40])


def test_pretraining_writes_a_model_that_loads_and_repeats(tmp_path, few):
    records = [pretrain_vlm.pretrain_vlm(SMALL, tmp_path / name) for name in ("one", "two")]
    found = json.loads((tmp_path / "one" / "training_record.json").read_text())
    assert found == records[0]
    assert [curve[-1]["step"] for curve in found["curves"].values()] == [2, 2]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]
    assert len(weights[0]) < 12_000_000
    data = pretrain_vlm.load_data()
    again = pretrain_vlm.measure(vlm.load_vlm(tmp_path / "one"), data)
    assert again == pytest.approx(found["heldout_of_bf16_file"], abs=1e-4)


def test_training_and_curve_share_no_stem(few):
    data = pretrain_vlm.load_data()
    some = icons(MATERIAL)[:40]
    train, heldout = ({some[place].stem for place in places} for places in (data.train, data.heldout))
    assert train
    assert heldout
    assert not train & heldout


def test_drawn_pictures_are_moved_and_resized_and_lose_no_ink(few):
    data = pretrain_vlm.load_data()
    plain = data.pictures.drawn(data.train, None)
    drawn = data.pictures.drawn(data.train, torch.Generator().manual_seed(0))
    assert plain.shape == drawn.shape == (len(data.train), 3, PIXELS, PIXELS)
    assert not torch.equal(plain, drawn)
    ink = [sorted((1 - one.double()).sum().item() for one in some) for some in (plain, drawn)]
    assert sum(ink[1]) > 0.5 * sum(ink[0])


def test_the_file_is_the_records(tmp_path):
    record = json.loads((vlm.FOLDER / "training_record.json").read_text())
    model = vlm.load_vlm()
    assert sum(p.numel() for p in model.parameters()) == record["parameters"]
    assert (vlm.FOLDER / "model.safetensors").stat().st_size < 12_000_000
    assert record["heldout_of_bf16_file"]["loss"] < record["heldout_with_blank_pictures"]["loss"] - 0.5
    assert model.config.image_token_index == vlm.PICTURE


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_missing_model_says_how_to_make_it(tmp_path, missing):
    for name in {"config.json", "model.safetensors"} - {missing}:
        (tmp_path / name).write_bytes((vlm.FOLDER / name).read_bytes())
    with pytest.raises(BenchmarkError, match=rf"{missing}.*python -m benchmarks pretrain --model vlm"):
        vlm.load_vlm(tmp_path)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 6, 10), (2, 10, 6)])
def test_orthogonalized_matrices_keep_their_directions(shape):
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(shape, generator=generator, dtype=torch.float64)
    found = orthogonalized(matrices)
    for matrix, one in zip(matrices, found, strict=True):
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        middle = u.mT @ one @ v.mT
        torch.testing.assert_close(middle, middle.diagonal().diag(), atol=1e-9, rtol=0)
        assert ((middle.diagonal() > 0.4) & (middle.diagonal() < 1.3)).all()


def test_muon_takes_the_steps_of_torchs():
    torch.manual_seed(0)
    first = [torch.nn.Parameter(torch.randn(6, 9)), torch.nn.Parameter(torch.randn(6, 9))]
    second = [torch.nn.Parameter(one.detach().clone()) for one in first]
    ours = Muon(first, lr=0.02, weight_decay=0.1)
    theirs = torch.optim.Muon(second, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    start = [one.detach().clone() for one in first]
    for _ in range(3):
        for mine, other in zip(first, second, strict=True):
            mine.grad = torch.randn(6, 9)
            other.grad = mine.grad.clone()
        ours.step()
        theirs.step()
    for before, mine, other in zip(start, first, second, strict=True):
        moved = (other - before).norm()
        assert (mine - other).norm() < 0.02 * moved  # theirs is in bf16


def test_the_command_refuses_what_is_the_other_models(refusal, tmp_path):
    out = ["--out", str(tmp_path)]
    assert "--minutes is for the Llama" in refusal(["pretrain", "--model", "vlm", "--minutes", "1", *out])
    assert "--encoder-steps is for --model vlm" in refusal(
        ["pretrain", "--encoder-steps", "1", "--steps", "1", *out]
    )
    assert "exactly one of --minutes and --steps" in refusal(["pretrain", *out])
