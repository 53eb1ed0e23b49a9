"""Loss and exact match on answers, against slow twins on a tiny random model."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.base_model.load import load_base_model
from benchmarks.tasks.objective import IGNORED, answer_loss, collate, evaluate
from benchmarks.tasks.task import Example

END = 1
EXAMPLES = [
    Example((5, 6, 7), (8, 9, END)),
    Example((10, 11, 12, 13, 14, 15, 16), (17, END)),
    Example((4,), (20, 21, 22, END)),
    Example((9, 8, 7, 6, 5), (END,)),
]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=40, initializer_range=0.5, tie_word_embeddings=True, **sizes)
    return LlamaForCausalLM(config).double().eval()


def slow_log_probabilities(model, example):
    """Log probability of every answer token, the example alone and without any padding."""
    tokens = torch.tensor([[*example.prompt, *example.answer]])
    log_probabilities = model(tokens).logits[0].log_softmax(-1)
    first = len(example.prompt)
    return [log_probabilities[first + i - 1, token] for i, token in enumerate(example.answer)]


def test_labels_are_the_answer_and_nothing_else():
    batch = collate(EXAMPLES[:2])
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9, 0, 0, 0], [10, 11, 12, 13, 14, 15, 16, 17]]
    no = IGNORED
    assert batch.labels.tolist() == [[no, no, 8, 9, END, no, no, no], [no] * 6 + [17, END]]
    assert batch.padding == pytest.approx(3 / 16)


def test_loss_is_the_mean_over_answer_tokens_whatever_the_padding(model):
    expected = -torch.stack(
        [p for example in EXAMPLES for p in slow_log_probabilities(model, example)]
    ).mean()
    assert answer_loss(model, collate(EXAMPLES)).item() == pytest.approx(expected.item(), rel=1e-6)


def test_gradients_do_not_depend_on_the_padding_token(model):
    gradients = []
    for pad in (0, 33):
        model.zero_grad()
        answer_loss(model, collate(EXAMPLES, pad)).backward()
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_score_does_not_depend_on_batches(model, batch_size):
    reference = -torch.stack(
        [p for example in EXAMPLES for p in slow_log_probabilities(model, example)]
    ).mean()
    assert evaluate(model, EXAMPLES, batch_size).loss == pytest.approx(reference.item(), rel=1e-6)


def greedy(model, prompt, most):
    """Generate token by token until the end token, re-reading the whole text every time."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + most and (len(tokens) == len(prompt) or tokens[-1] != END):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tuple(tokens[len(prompt) :])


def test_exact_match_is_what_greedy_generation_gives(model):
    prompts = [(a, b, c) for a in (4, 9, 13, 30) for b in (5, 21) for c in (6, 33, 38)]
    right = [Example(prompt, greedy(model, prompt, 5)) for prompt in prompts]
    wrong = [Example(e.prompt, (*e.answer[:-1], (e.answer[-1] + 1) % 40)) for e in right]
    assert evaluate(model, right).exact_match == 1.0
    assert evaluate(model, wrong).exact_match == 0.0
    assert evaluate(model, right[:6] + wrong[6:]).exact_match == 6 / len(right)


def test_exact_match_of_the_real_task_agrees_with_generation(naming_task):
    model, _ = load_base_model()
    some = naming_task.heldout[:6]
    generated = [Example(e.prompt, greedy(model, e.prompt, 6)) for e in some]
    assert evaluate(model, generated).exact_match == 1.0
    hits = sum(made.answer == real.answer for made, real in zip(generated, some, strict=True))
    assert evaluate(model, some).exact_match == hits / len(some)


def test_evaluation_leaves_the_mode_as_it_was(model):
    model.train()
    evaluate(model, EXAMPLES)
    assert model.training
    model.eval()
