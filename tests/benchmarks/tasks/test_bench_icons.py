"""The task "icons": its pictures, its split, its loss and answers; what a run and the page make of them."""

import dataclasses
import json
import statistics
import sys

import pytest
import torch

from benchmarks.base_model import icons as fonts
from benchmarks.base_model import vlm
from benchmarks.base_model.icons import MATERIAL, PHOSPHOR, PIXELS, Icon, render
from benchmarks.comparison.answers import page
from benchmarks.core import environment
from benchmarks.core.files import BenchmarkError
from benchmarks.core.results import RunConfig, write_result
from benchmarks.tasks import answers, icons
from benchmarks.tasks.embedded import cache_file
from benchmarks.tasks.objective import IGNORED, answer_loss, collate, evaluate
from benchmarks.tasks.registry import TASKS, TEXT_TASKS
from benchmarks.tasks.task import PictureExample
from benchmarks.training.train import Run, train


@pytest.fixture(scope="module")
def model():
    return vlm.load_vlm()


def named(of):
    return {icon.name: icon for icon in fonts.icons(of)}


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("airplane tilt", "airplane tilt"),
        ("airplane tilt bold", "airplane tilt"),
        ("account box outline", "account box"),
        ("outline", "outline"),
        ("light bold", "light bold"),
    ],
)
def test_a_stem_is_the_name_without_words_of_style(name, stem):
    assert Icon(name, "x").stem == stem


def test_no_stem_and_no_picture_stands_on_both_sides(rows_of):
    rows = rows_of(icons.RECIPE)
    for what in ("label", "body", "origin"):
        sides = [{getattr(row, what) for row in rows if row.split == split} for split in ("train", "heldout")]
        assert all(sides)
        assert not sides[0] & sides[1]


def test_pretraining_saw_no_held_out_stem(rows_of):
    seen = {icon.stem for icon in fonts.icons(MATERIAL) if not icon.is_held_out}
    rows = rows_of(icons.RECIPE)
    heldout, train = ({r.label for r in rows if r.split == split} for split in ("heldout", "train"))
    assert not seen & heldout
    assert len(seen & train) > 100  # names that both sets have: the split, not chance, keeps them apart


def test_pictures_are_drawn_in_the_style_that_the_name_says():
    known = named(PHOSPHOR)
    ink = {}
    for style in ("thin", "", "bold", "fill"):
        some = [
            known[f"{stem} {style}".strip()] for stem in ("airplane", "armchair", "bell", "heart", "cube")
        ]
        pictures = render(PHOSPHOR, some)
        assert {len(picture) for picture in pictures} == {PIXELS**2}
        assert len(set(pictures)) == len(pictures)
        ink[style] = [sum(255 - byte for byte in picture) for picture in pictures]
    for lighter, heavier in (("thin", ""), ("", "bold"), ("bold", "fill")):
        assert all(a < b for a, b in zip(ink[lighter], ink[heavier], strict=True))


def test_a_picture_is_read_row_by_row(few_icons):
    example = few_icons.heldout[0]
    values = vlm.pixel_values([example.picture, bytes(PIXELS**2)])
    assert values.shape == (2, 3, PIXELS, PIXELS)
    expected = torch.tensor(list(example.picture)).view(PIXELS, PIXELS) / 127.5 - 1
    for channel in values[0]:
        torch.testing.assert_close(channel, expected)
    assert (values[1] == -1).all()


def test_missing_packages_are_named_with_the_remedy(monkeypatch, tokenizer, few_icons):
    with monkeypatch.context() as patch:
        patch.setattr(fonts, "WHEEL", "qtawesome_is_not_here")
        with pytest.raises(BenchmarkError, match=r"qtawesome_is_not_here.*not installed: pip install"):
            fonts.icons(PHOSPHOR)
    with pytest.raises(BenchmarkError, match=r"a version without none\.ttf; install the pinned one"):
        render(dataclasses.replace(PHOSPHOR, font="none.ttf"), [])
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "PIL", None)
        with pytest.raises(
            BenchmarkError, match=r"rendered with Pillow, which is not installed: pip install"
        ):
            render(PHOSPHOR, [])
    monkeypatch.setattr(environment, "installed_version", lambda name: None if name == "qtawesome" else "1")
    with pytest.raises(BenchmarkError, match=r"not installed: qtawesome;.*pip install -e '\.\[bench\]'"):
        cache_file(icons.RECIPE, tokenizer)


def test_the_loss_is_the_mean_over_answer_tokens_whatever_the_padding(model, few_icons):
    examples = few_icons.heldout[:5]
    slow = []
    for example in examples:
        tokens = torch.tensor([[*example.prompt, *example.answer]])
        pixels = vlm.pixel_values([example.picture])
        logits = model(input_ids=tokens, pixel_values=pixels).logits[0].log_softmax(-1)
        slow += [-logits[len(example.prompt) + i - 1, token] for i, token in enumerate(example.answer)]
    assert len({len(example) for example in examples}) > 1
    assert answer_loss(model, collate(examples)).item() == pytest.approx(
        float(sum(slow)) / len(slow), rel=1e-4
    )
    assert (collate(examples).labels != IGNORED).sum() == len(slow)


def greedy(model, example):
    tokens = list(example.prompt)
    while len(tokens) < len(example.prompt) + icons.MAX_ANSWER and tokens[-1] != 1:
        given = {"input_ids": torch.tensor([tokens]), "pixel_values": vlm.pixel_values([example.picture])}
        tokens.append(int(model(**given).logits[0, -1].argmax()))
    return tokens[len(example.prompt) :]


@torch.no_grad()
def test_answers_are_greedy_and_agree_with_the_exact_match(model, few_icons, tokenizer):
    said = answers.said(model, few_icons.heldout, batch_size=5)
    for example, answer in list(zip(few_icons.heldout, said, strict=True))[:4]:
        assert tokenizer.decode(greedy(model, example)).strip() == answer
    # What was said, taken for the truth, is right as a whole wherever it came to its end.
    ended = [e for e in few_icons.heldout[:6] if greedy(model, e)[-1] == 1]
    own = [dataclasses.replace(example, answer=tuple(greedy(model, example))) for example in ended]
    assert own
    assert evaluate(model, own).exact_match == 1.0
    exact = statistics.fmean(
        answer == example.text for example, answer in zip(few_icons.heldout, said, strict=True)
    )
    assert evaluate(model, few_icons.heldout).exact_match == exact


@pytest.mark.parametrize(
    ("wanted", "said", "f1"),
    [
        ("arrow left bold", "arrow left bold", 1.0),
        ("arrow left bold", "bold left arrow", 1.0),
        ("arrow left bold", "arrow", 0.5),
        ("arrow left", "left left", 0.5),
        ("arrow left", "bell", 0.0),
        ("arrow", "", 0.0),
    ],
)
def test_word_f1(wanted, said, f1):
    assert answers.shared_words(wanted, said) == pytest.approx(f1)


def test_the_embedded_model_names_what_it_sees(model, tokenizer):
    """Material icons of names that pretraining never saw, with their pictures and with their neighbours'."""
    some = [icon for icon in fonts.icons(MATERIAL) if icon.is_held_out][::11]
    pictures, examples = render(MATERIAL, some), []
    for shift in (0, 1):
        examples.append(
            [
                PictureExample(
                    vlm.PROMPT, tuple(tokenizer.encode(f" {icon.name}<eos>").ids), picture, icon.name
                )
                for icon, picture in zip(some, pictures[shift:] + pictures[:shift], strict=True)
            ]
        )
    (seen, f1), (other, other_f1) = (
        (evaluate(model, one).loss, answers.word_f1(one, answers.said(model, one))) for one in examples
    )
    assert seen < other - 0.3
    assert f1 > other_f1 + 0.05


@pytest.fixture(scope="module")
def trained(few_icons):
    config = RunConfig("icons", "grit", 5e-3, 0, steps=2, batch_size=4, rank=4, alpha=4, eval_every=2)
    run = Run(config, few_icons)
    assert not train(run)
    run.answer()
    yield run
    run.optimizer.close()


def test_a_run_adapts_every_part(trained):
    parts = trained.optimizer.ranks().by_modality()
    assert set(parts) == {"vision", "cross_modal", "text"}
    counts = {name: sum(site.modality == name for site in trained.optimizer.ranks().sites) for name in parts}
    assert counts == {"vision": 36, "cross_modal": 2, "text": 28}
    result = trained.result(False)
    assert len(result["answers"]) == len(trained.task.heldout)
    assert 0 <= result["word_f1"] <= 1
    json.dumps(result, allow_nan=False)


@pytest.fixture
def finished(trained, tmp_path, monkeypatch):
    """A folder with the run's result, whose answers are half right."""
    names = [example.text for example in trained.task.heldout]
    said = [name if place % 2 else "nothing of that" for place, name in enumerate(names)]
    extra = {"fingerprint": "f", "hardware": {}, "versions": {}, "answers": said, "word_f1": 0.5}
    write_result(tmp_path, {**trained.result(False), **extra})
    monkeypatch.setattr("benchmarks.comparison.answers.load_task", lambda name, tokenizer: trained.task)
    return tmp_path


def test_the_page_of_pictures(finished):
    line = page(finished, finished / "page.png")
    assert "grit at learning rate 0.005, seed 0: 6 of 12 names right, word F1 0.500" in line
    assert (finished / "page.png").read_bytes().startswith(b"\x89PNG")


def test_a_page_is_refused_where_there_is_none_to_draw(finished, monkeypatch, trained):
    with pytest.raises(BenchmarkError, match=r"no finished run by adamw on a task with pictures \(icons\)"):
        page(finished, finished / "page.png", "adamw")
    other = dataclasses.replace(trained.task, fingerprint="other")
    monkeypatch.setattr("benchmarks.comparison.answers.load_task", lambda name, tokenizer: other)
    with pytest.raises(BenchmarkError, match=r"pictures were other ones.*pyproject\.toml pins"):
        page(finished, finished / "page.png")


def test_tasks_of_text_alone_are_the_suites_default():
    assert set(TASKS) - set(TEXT_TASKS) == {"icons"}


def test_what_reads_text_alone_is_refused(few_icons, refusal, tmp_path):
    with pytest.raises(BenchmarkError, match="--adapted-layers is for models that read text alone"):
        Run(RunConfig("icons", "adamw", 1e-3, 0, adapted_layers=2), few_icons)
    assert "`sizes` adapts a model that reads text alone; take one of naming" in refusal(
        ["sizes", "--task", "icons", "--out", str(tmp_path)]
    )


@pytest.mark.parametrize("optimizer", ["adamw", "grit"])
def test_parts_may_have_rates_of_their_own(few_icons, optimizer):
    options = {"part_rates": {"vision": 0.5, "cross_modal": 2}}
    run = Run(RunConfig("icons", optimizer, 0.01, 0, steps=2, warmup=0, options=options), few_icons)
    assert [group["initial_lr"] for group in run.optimizer.param_groups] == [0.005, 0.02, 0.01]
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    assert sum(p.numel() for group in run.optimizer.param_groups for p in group["params"]) == trained


def test_rates_of_parts_that_are_not_there_are_refused(few_icons):
    config = RunConfig("icons", "adamw", 0.01, 0, options={"part_rates": {"sight": 0.5}})
    with pytest.raises(BenchmarkError, match=r"--option part_rates: .*sight"):
        Run(config, few_icons)
