"""A user's own file: the forms a row may have, what is masked, and errors that say where and what."""

import json
from pathlib import Path

import pytest
from public_rows import write
from tiny_models import make_tokenizer

from benchmarks.core.files import BenchmarkError
from benchmarks.finetune.batches import Collator
from benchmarks.finetune.config import FinetuneConfig
from benchmarks.finetune.data import Encoder, Origin, load, parse_origin
from benchmarks.finetune.rows import HubData, read, table
from benchmarks.tasks.external import Text

TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "No."},
]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def encoded(tmp_path, tokenizer):
    """A function that gives prompt and answer of rows as the model gets them, special tokens and all."""

    def run(*rows):
        texts = read(table(write(tmp_path / "own.jsonl", rows)), tokenizer)
        return [(tokenizer.decode(e.prompt), tokenizer.decode(e.answer)) for e in Encoder(tokenizer)(texts)]

    return run


def test_prompt_and_completion_stay_as_they_are(encoded):
    assert encoded({"prompt": "Q: 1\n", "completion": " A: 2"}) == [("Q: 1\n", " A: 2</s>")]


def test_instructions_get_alpacas_prompt(encoded):
    head = "Below is an instruction that describes a task"
    tail = "### Instruction:\nI\n\n### Response:\n"
    ((bare, answer),) = encoded({"instruction": "I", "output": "O"})
    assert bare == f"{head}. Write a response that appropriately completes the request.\n\n{tail}"
    assert answer == "O</s>"
    ((given, _),) = encoded({"instruction": "I", "input": "X", "output": "O"})
    assert given.endswith("### Input:\nX\n\n### Response:\n")


def test_text_is_trained_on_from_its_second_token(encoded, tokenizer):
    ((prompt, answer),) = encoded({"text": "Some text."})
    assert prompt + answer == "Some text.</s>"
    assert len(tokenizer(prompt)["input_ids"]) == 1


def test_every_answer_in_a_conversation_is_trained_on_with_what_came_before(encoded, tokenizer):
    assert len(tokenizer("</s>")["input_ids"]) == 1  # so special tokens in the text are no text
    assert encoded({"messages": TALK}) == [
        ("<s>[user]Hi[assistant]", "Hello.</s>"),
        ("<s>[user]Hi[assistant]Hello.</s>[user]And?[assistant]", "No.</s>"),
    ]


def test_a_tokenizer_that_begins_texts_begins_prompts_and_not_answers():
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    (example,) = Encoder(tokenizer)([read_text("Q", "A")])
    assert (example.prompt[0], example.answer[-1]) == (0, 1)
    assert [*example.prompt[1:], *example.answer[:-1]].count(0) == 0
    assert [*example.prompt[1:], *example.answer[:-1]].count(1) == 0


def read_text(prompt, answer):
    return Text(prompt, answer)


def test_prompt_and_padding_are_masked(tokenizer):
    short, long = Encoder(tokenizer)(
        [read_text("What is 1?", "A."), read_text("What is 1?", "A number it is.")]
    )
    batch = Collator(pad=1, narrow=False)([short, long])
    seen = batch["labels"][0]
    kept = seen[seen != -100].tolist()
    assert kept == list(short.answer)
    assert (seen[: len(short.prompt)] == -100).all()
    assert batch["attention_mask"].sum(1).tolist() == [len(short) - 1, len(long) - 1]


def test_turns_of_one_conversation_stay_on_one_side(tmp_path, tokenizer):
    talks = [
        {"messages": [{**m, "content": f"{m['content']} {n}"} for m in TALK]} for n in range(120)
    ]  # 5 % of the openings
    config = FinetuneConfig("m", "d", max_length=190, eval_examples=None)
    data = load(Origin("own", write(tmp_path / "own.jsonl", talks)), tokenizer, config)
    openings = [
        {tokenizer.decode(e.prompt).split("[assistant]")[0] for e in side}
        for side in (data.task.train, data.task.heldout)
    ]
    assert not openings[0] & openings[1]
    assert len(data.task.heldout) == 2 * len(openings[1]) >= 2
    assert len(data.task.train) + len(data.task.heldout) == 240


def test_some_of_the_examples_are_the_same_ones_every_time(tmp_path, tokenizer):
    path = write(tmp_path / "own.jsonl", [{"prompt": f"{n}?", "completion": str(n)} for n in range(300)])
    config = FinetuneConfig("m", "d", train_examples=20, eval_examples=5)
    one, other = (load(Origin("own", path), tokenizer, config) for _ in range(2))
    assert one == other
    assert (len(one.task.train), len(one.task.heldout)) == (20, 5)
    assert "not drawn" in one.task.note


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "own.jsonl has no rows; it must be a jsonl file"),
        ('{"prompt": "p", "completion": "c"}\nno json\n', "own.jsonl:2 is no JSON"),
        (
            '{"question": "q", "solution": "s"}\n',
            "own.jsonl:1 has the fields question, solution; a row needs one of: "
            "messages; prompt and completion; instruction and output; text",
        ),
        (
            '{"prompt": "p"}\n',
            "own.jsonl:1 lacks completion; every row of this file needs: prompt, completion",
        ),
        ('{"text": "a"}\n\n{"prompt": "p"}\n', "own.jsonl:3 lacks text"),
        ('{"prompt": ["p"], "completion": "c"}\n', "own.jsonl:1: prompt is list, not text"),
        ('{"instruction": "i", "input": null, "output": "o"}\n', "own.jsonl:1: input is NoneType, not text"),
        ('{"messages": []}\n', "own.jsonl:1 lacks messages, a list of objects with role and content"),
        ('{"messages": [{"role": "user"}]}\n', "own.jsonl:1: message 1 lacks content"),
        (
            '{"messages": [{"role": "user", "content": "c"}]}\n',
            "own.jsonl:1 has no message of the role assistant",
        ),
    ],
)
def test_bad_rows_are_named(tmp_path, tokenizer, lines, message):
    path = tmp_path / "own.jsonl"
    path.write_text(lines)
    with pytest.raises(BenchmarkError) as caught:
        read(table(path), tokenizer)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "the model's tokenizer has no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "chat template refuses it: roles must alternate"),
        ("{{ messages | length }}", "writes the conversation before message 2 otherwise"),
    ],
)
def test_a_chat_template_that_is_missing_or_will_not_do(tmp_path, template, message):
    with pytest.raises(BenchmarkError, match=message):
        read(table(write(tmp_path / "own.jsonl", [{"messages": TALK}])), make_tokenizer(template))


def test_what_a_dataset_may_be(tmp_path):
    path = write(tmp_path / "own.jsonl", [])
    assert parse_origin("gsm8k", None) == Origin("gsm8k")
    assert parse_origin(f"gsm8k={tmp_path}", None) == Origin("gsm8k", folder=tmp_path)
    assert parse_origin(str(path), path) == Origin("own", path, heldout=path)
    own = parse_origin("some-one/data.v1", path)
    assert own == Origin("data.v1", HubData("some-one/data.v1"), heldout=path)
    assert (own.hub, own.argument) == ("some-one/data.v1", "some-one/data.v1")
    several = parse_origin("one/data:small", None)
    assert several == Origin("data", HubData("one/data", "small"))
    assert (several.hub, several.argument) == ("one/data", "one/data:small")
    for wrong in ("squad", "folder/rows.jsonl", "a/b/c", str(tmp_path)):
        with pytest.raises(BenchmarkError, match=r"neither known data .*boolq.* nor a file.*OWNER/NAME"):
            parse_origin(wrong, None)
    with pytest.raises(BenchmarkError, match=r"--eval-data nowhere\.jsonl: no such file"):
        parse_origin(str(path), Path("nowhere.jsonl"))
    with pytest.raises(BenchmarkError, match="no such folder"):
        parse_origin("gsm8k=nowhere", None)
    with pytest.raises(BenchmarkError, match="held-out part of its own"):
        parse_origin("gsm8k", path)


def test_nothing_held_out_names_the_option(tmp_path, tokenizer):
    path = write(tmp_path / "own.jsonl", [{"prompt": "p", "completion": "c"}])
    with pytest.raises(BenchmarkError, match=r"a split is empty.*--eval-data"):
        load(Origin("own", path), tokenizer, FinetuneConfig("m", "d"))


def test_rows_that_are_not_json_objects(tmp_path, tokenizer):
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps([1]))
    with pytest.raises(BenchmarkError, match=r"own\.jsonl:1 is no JSON object"):
        read(table(path), tokenizer)
