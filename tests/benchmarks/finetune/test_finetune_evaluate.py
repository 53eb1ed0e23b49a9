"""What a model is judged by: numbers, labels, generated answers; and the record of it."""

import json
from decimal import Decimal

import pytest
import torch
from finetuning import local_copies

from benchmarks.base_model.source import Source, load_tokenizer
from benchmarks.finetune.config import FinetuneConfig
from benchmarks.finetune.data import Origin, load
from benchmarks.finetune.evaluate import Evaluator, final_number
from benchmarks.finetune.model import load_model
from benchmarks.finetune.session import Record, Session


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3\n#### 18", 18),
        ("#### 1,234", 1234),
        ("#### $5.50", Decimal("5.5")),
        ("####-7.", -7),
        ("#### 18 #### 19", 18),
        ("#### 70000.00", 70000),
        ("18", None),
        ("#### none", None),
        ("#### ,", None),
    ],
)
def test_final_numbers(text, number):
    assert final_number(text) == number


@pytest.fixture(scope="module")
def evaluator(tiny_model, tmp_path_factory):
    """A function that gives the evaluator of data on the tiny model."""

    def make(name, count=6, **settings):
        folder = tmp_path_factory.mktemp(name)
        local_copies(folder, name)
        config = FinetuneConfig(
            "tiny", name, rank=4, max_length=192, eval_examples=count, batch_size=4, **settings
        )
        source = Source(str(tiny_model))
        tokenizer = load_tokenizer(source)
        data = load(Origin(name, folder=folder), tokenizer, config)
        return Session(load_model(source, config), tokenizer, data, config, 192).evaluator

    return make


def nats(model, prompt, answer):
    ids = torch.tensor([[*prompt, *answer]])
    labels = ids.clone()
    labels[:, : len(prompt)] = -100
    return float(model(input_ids=ids, labels=labels).loss) * len(answer)


@torch.no_grad()
def test_accuracy_takes_the_likelier_label(evaluator):
    judge = evaluator("qnli")
    yes, no = judge.data.heldout.labels
    model = judge.model.eval()
    right = [
        (yes if nats(model, e.prompt, yes) < nats(model, e.prompt, no) else no) == e.answer
        for e in judge.data.task.heldout
    ]
    assert judge.measure(False)["accuracy"] == sum(right) / 6


@torch.no_grad()
def test_generation_is_greedy_one_token_at_a_time(evaluator):
    judge = evaluator("gsm8k", max_new_tokens=5)
    prompts = [e.prompt for e in judge.data.task.heldout[:5]]
    made = judge.generate([prompts[0], *(p[:-7] for p in prompts[1:])])
    model = judge.model.eval()
    for prompt, text in zip([prompts[0], *(p[:-7] for p in prompts[1:])], made, strict=True):
        ids = list(prompt)
        for _ in range(5):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == 1:
                break
        assert text == judge.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)


def test_final_numbers_are_compared_in_the_examples_order(evaluator, monkeypatch):
    judge = evaluator("gsm8k", generate_examples=4)
    answers = judge.data.heldout.answers
    wanted = {e.prompt: a for e, a in zip(judge.data.task.heldout, answers, strict=True)}
    monkeypatch.setattr(
        Evaluator, "generate", lambda self, prompts: ["#### 0", *(wanted[p] for p in prompts[1:])]
    )
    found = judge.measure(True)
    assert (found["final_number_exact_match"], found["generated"]) == (0.75, 4)
    monkeypatch.setattr(Evaluator, "generate", lambda self, prompts: ["no number"] * len(prompts))
    assert judge.measure(True)["final_number_exact_match"] == 0
    assert "final_number_exact_match" not in judge.measure(False)


def test_evaluation_changes_nothing(evaluator):
    judge = evaluator("gsm8k", generate_examples=2, max_new_tokens=3)
    judge.model.train()
    before = {n: p.clone() for n, p in judge.model.named_parameters()}
    state = torch.get_rng_state()
    one, other = judge.measure(True), judge.measure(True)
    assert one == other
    assert judge.model.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(p, before[n]) for n, p in judge.model.named_parameters())


def test_a_record_travels_with_its_checkpoint(tmp_path):
    record = Record([1.5, None], [0.1, 0.2], [{"step": 0, "loss": 2.0}])
    record.save(tmp_path)
    assert Record.load(tmp_path) == record
    assert record.diverged
    assert not Record([1.5], [0.1], [{"step": 0, "loss": 2.0}]).diverged
    assert json.loads((tmp_path / "progress.json").read_text())["losses"] == [1.5, None]
