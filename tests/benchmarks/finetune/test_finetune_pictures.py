"""`train` on rows with pictures: both trainers, every form of row, and what cannot be read."""

import json

import finetuning
import pytest
import torch
import vlm
from PIL import Image

from benchmarks.core.files import BenchmarkError
from benchmarks.finetune import pictures
from benchmarks.finetune.pictures import PictureCollator, PictureExample
from benchmarks.finetune.rows import HubData, table

pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny Llava with its processor, as save_pretrained writes them."""
    folder = tmp_path_factory.mktemp("llava")
    vlm.plain().save_pretrained(folder)
    vlm.processor().save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    """A file of rows, its pictures beside it."""
    for i in range(12):
        Image.new("RGB", (9, 11), (20 * i, 255 - 20 * i, 90)).save(tmp_path / f"p{i}.png")
    rows = [{"image": f"p{i}.png", "prompt": "w1 w2", "completion": f"w{i} w3 w4"} for i in range(9)]
    rows.append({"images": ["p9.png", "p10.png"], "prompt": "w5", "completion": "w9 w10"})
    rows.append({"prompt": "w7 w8", "completion": "w11"})
    return write(tmp_path / "rows.jsonl", rows)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path, processor=None):
    """The turns of a file."""
    return pictures.read(table(path), path.parent, processor or vlm.processor())


SMALL = ["--eval-data", "{}", "--max-length", "40", "--lr", "1e-3"]


def train(model, data, out, *arguments):
    own = [part.format(data) for part in SMALL]
    return finetuning.train(model, data, out, *own, *arguments)


@pytest.mark.filterwarnings("ignore")
def test_both_trainers_end_with_the_same_weights(model, data, tmp_path):
    held = write(
        data.with_name("held.jsonl"), [{"image": "p11.png", "prompt": "w1 w2", "completion": "w11 w3"}]
    )
    losses = {}
    for trainer in ("loop", "hf"):
        metrics = train(model, data, tmp_path / trainer, "--trainer", trainer, "--eval-data", str(held))
        parts = metrics["telemetry"]["modalities"]
        assert {part: told["sites"] for part, told in parts.items()} == {
            "vision": 12,
            "cross_modal": 2,
            "text": 14,
        }
        assert metrics["data"]["training"] == 11
        losses[trainer] = metrics["train_losses"]
        assert (tmp_path / trainer / "processor_config.json").exists()
    assert losses["loop"] == losses["hf"]


def test_rows_become_prompts_with_the_pictures_tokens(data):
    processor = vlm.processor()
    turns = read(data, processor)
    assert [len(turn.pictures) for turn in turns] == [1] * 9 + [2, 0]
    assert len({turn.key for turn in turns}) == 11, "one prompt with other pictures is another question"
    ids = processor.tokenizer.encode(turns[9].answer, add_special_tokens=False)
    example = pictures.encoded(turns[9], ids, processor)
    assert sum(token == vlm.IMAGE for token in example.prompt) == 8
    assert example.answer[-1] == processor.tokenizer.eos_token_id


def test_messages_may_say_where_the_pictures_stand(data):
    content = [{"type": "text", "text": "w1"}, {"type": "image"}, {"type": "text", "text": "w2"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "w3"}]
    path = write(data.with_name("talk.jsonl"), [{"messages": messages, "image": "p1.png"}])
    (turn,) = read(path)
    assert turn.prompt.split() == ["user", "w1", "<image>", "w2"]


def test_batches_hold_the_pictures_in_the_order_of_their_tokens(data):
    processor = vlm.processor()
    examples = [pictures.encoded(turn, [5, 2], processor) for turn in read(data, processor)[8:]]
    batch = PictureCollator(0, False, processor)(examples)
    assert batch["pixel_values"].shape == (3, 3, 8, 8)
    assert (batch["input_ids"] == vlm.IMAGE).sum(1).tolist() == [4, 8, 0]
    alone = PictureCollator(0, False, processor)(examples[:1])
    assert torch.equal(batch["pixel_values"][:1], alone["pixel_values"])
    assert isinstance(examples[0], PictureExample)


def test_what_the_hubs_image_columns_hold_is_read_too(data):
    raw = data.with_name("p3.png").read_bytes()
    kinds = [
        {"bytes": raw, "path": None},
        {"bytes": None, "path": "p3.png"},
        Image.open(data.with_name("p3.png")),
    ]
    found = [pictures.picture(value, "row 1", data.parent).open().tobytes() for value in kinds]
    assert len(set(found)) == 1


def test_a_parquet_file_of_the_hub_is_read_with_its_image_column(data):
    datasets = pytest.importorskip("datasets")
    files = [str(data.with_name(f"p{i}.png")) for i in range(3)]
    columns = {"image": files, "prompt": ["w1"] * 3, "completion": ["w2", "w3", "w4"]}
    path = data.with_name("train.parquet")
    datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()).to_parquet(str(path))
    turns = read(path)
    assert [turn.pictures[0].open().size for turn in turns] == [(9, 11)] * 3
    path.write_bytes(b"no parquet")
    with pytest.raises(BenchmarkError, match=r"cannot read .*train\.parquet"):
        read(path)


@pytest.fixture
def hub(data, monkeypatch):
    """Data on the hub with a column of images, as bytes and as files; the calls are recorded."""
    datasets = pytest.importorskip("datasets")
    files = [data.with_name(f"p{i}.png") for i in range(12)]
    columns = {
        "image": [{"bytes": files[i].read_bytes()} if i < 6 else {"path": str(files[i])} for i in range(12)],
        "prompt": ["w1 w2"] * 12,
        "completion": [f"w{i} w3" for i in range(12)],
    }
    held, calls = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()), []

    def load_dataset(repository, config=None, *, split):
        calls.append((repository, config, split))
        return held

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_data_on_the_hub_train_by_their_id(hub, model, data, tmp_path):
    held = write(data.with_name("held.jsonl"), [{"image": "p1.png", "prompt": "w5", "completion": "w3"}])
    metrics = train(model, "one/pictures:small", tmp_path / "out", "--eval-data", str(held))
    assert hub == [("one/pictures", "small", "train")]
    assert metrics["data"]["training"] == 12
    assert (metrics["data"]["hub"], metrics["data"]["argument"]) == ("one/pictures", "one/pictures:small")
    assert metrics["telemetry"]["modalities"]["vision"]["sites"] == 12


def test_rows_of_the_hub_hold_the_bytes_of_its_pictures(hub, data):
    turns = pictures.read(table(HubData("one/pictures")), None, vlm.processor())
    files = [data.with_name(f"p{i}.png").read_bytes() for i in range(12)]
    assert [turn.pictures[0].data for turn in turns] == files


def test_a_path_in_a_row_of_the_hub_is_refused(data):
    rows = {"one/pictures, row 1": {"image": "p1.png", "prompt": "w1", "completion": "w2"}}
    with pytest.raises(BenchmarkError, match=r"one/pictures, row 1: the image p1.png .*holds the images"):
        pictures.read(rows, None, vlm.processor())


WRONG = {
    "missing": (
        {"image": "nowhere.png"},
        r"rows.jsonl:1: the image nowhere.png cannot be read \(.*No such file",
    ),
    "no picture": (
        {"image": "rows.jsonl"},
        r"rows.jsonl:1: the image rows.jsonl cannot be read \(cannot identify",
    ),
    "a number": ({"image": 3}, "rows.jsonl:1: the image given as 3 cannot be read"),
    "both": ({"image": "p1.png", "images": ["p1.png"]}, "rows.jsonl:1 has both image and images"),
}


@pytest.mark.parametrize(("row", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_picture_that_cannot_be_read_is_named_with_file_and_row(row, message, data):
    path = write(data, [{"prompt": "w1", "completion": "w2", **row}])
    with pytest.raises(BenchmarkError, match=message):
        read(path)


def test_as_many_images_as_the_messages_name(data):
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}]},
        {"role": "assistant", "content": "w1"},
    ]
    path = write(data, [{"image": "p1.png", "messages": messages}])
    with pytest.raises(BenchmarkError, match="its messages name 2 images, and the row has 1"):
        read(path)


def test_a_text_model_refuses_pictures(data, capsys, tmp_path):
    from tiny_models import save_model

    text = save_model(tmp_path / "text")
    finetuning.train(text, data, tmp_path / "out", "--eval-data", str(data), status=2)
    assert "holds pictures, and the model reads none" in capsys.readouterr().err
