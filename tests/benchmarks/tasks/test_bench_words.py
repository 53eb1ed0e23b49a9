"""Tasks in a model's own tokens: chat templates, end tokens, what is shortened, what is drawn."""

import pytest
from public_rows import rows
from tiny_models import make_tokenizer

from benchmarks.base_model.load import ANSWER, EOS
from benchmarks.core.files import BenchmarkError
from benchmarks.tasks import embedded, formats
from benchmarks.tasks.task import Example, Task
from benchmarks.tasks.words import ModelTokenizer, answer_ids, closing_tokens, frame_tokens, prompt_ids


@pytest.fixture(scope="module")
def chat():
    return ModelTokenizer(make_tokenizer())


@pytest.fixture(scope="module")
def plain():
    return ModelTokenizer(make_tokenizer(template=None))


def test_a_chat_model_is_asked_in_its_template(chat):
    ask = f"def <blank>(x):\n    return x\n{ANSWER}"
    (prompt,), (answer,) = prompt_ids(chat, [ask]), answer_ids(chat, [f" identity{EOS}"])
    assert chat.tokenizer.decode(prompt) == "<s>[user]def <blank>(x):\n    return x[assistant]"
    assert chat.tokenizer.decode(answer) == "identity</s>"
    assert answer[-1] == chat.end
    assert frame_tokens(chat) == len(chat.ids(["<s>[user][assistant]"])[0])


def test_another_model_reads_the_text_as_it_is(plain):
    (prompt,), (answer,) = prompt_ids(plain, [f"x\n{ANSWER}"]), answer_ids(plain, [f" identity{EOS}"])
    assert plain.tokenizer.decode(prompt) == f"x\n{ANSWER}"
    assert plain.tokenizer.decode(answer) == " identity</s>"


@pytest.mark.parametrize("name", ["gsm8k", "boolq", "qnli", "dolly", "alpaca"])
def test_a_message_is_the_sections_text_without_their_headings(name):
    for row in rows(name, 0, 3):
        prompt, _ = getattr(formats, name)(row)
        message = formats.as_message(prompt)
        assert "###" not in message
        assert "Below is an instruction" not in message
        for field in ("question", "instruction", "passage", "sentence", "context", "input"):
            assert row.get(field, "").strip() in message
    assert formats.as_message("def f():\n    pass") == "def f():\n    pass"


@pytest.mark.parametrize("kind", ["chat", "plain"])
def test_a_shortened_prompt_still_asks(kind, request):
    words = request.getfixturevalue(kind)
    sample = embedded.Sample("p", "o", "label", "body", "abc " * 300 + f"\n{ANSWER}", f" name{EOS}")
    (row,) = embedded.encode("train", [sample], words, max_answer=16, shorten=True)
    assert len(row.prompt) + len(row.answer) == embedded.MAX_LENGTH + frame_tokens(words)
    (whole,) = prompt_ids(words, [sample.prompt])
    closing = closing_tokens(words)
    assert row.prompt == [*whole[: len(row.prompt) - closing], *whole[-closing:]]
    assert words.tokenizer.decode(whole[-closing:]).strip() == ("[assistant]" if kind == "chat" else ANSWER)


def test_a_tokenizer_without_end_token_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(BenchmarkError, match="no end token"):
        ModelTokenizer(tokenizer)


def test_a_draw_is_the_beginning_of_a_larger_one_and_has_a_fingerprint_of_its_own():
    examples = tuple(Example((n,), (n,)) for n in range(20))
    task = Task("t", examples[:15], examples[15:], "f")
    assert task.drawn(None, None) is task
    small, large = task.drawn(4, 2), task.drawn(9, None)
    assert large.train[:4] == small.train
    assert set(large.train) < set(task.train)
    assert (len(small.heldout), large.heldout) == (2, task.heldout)
    assert len({task.fingerprint, small.fingerprint, large.fingerprint}) == 3
    assert task.drawn(4, 2) == small
