"""A question changes nothing: neither the state nor the training that follows, whoever asks and when."""

import threading

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from pairs import assert_same, everything, loss_of, network, train, wrapped

QUESTIONS = {
    "ranks": lambda o: o.ranks().table(),
    "telemetry": lambda o: o.telemetry(),
    "plan": lambda o: o.plan_ranks(0.7) if o.telemetry()["steps"] else None,
    "final": lambda o: o.final_ranks(),
    "check": lambda o: o.check_capture(),
    "state": lambda o: o.state_dict(),
    "repr": repr,
    "seconds": lambda o: o.stage_seconds(),
}
MODES = ["spectral", "steer", "eigenbasis", "balanced", "inverse", "none"]


def lose_a_direction(model):
    """What loading another adapter may do: a direction is no longer used."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_A" in name:
                p[-1] = 0
            elif "lora_B" in name:
                p[:, -1] = 0


def run(mode, asked, change):
    model = network()
    optimizer = wrapped(model, precondition=mode, reprojection="balanced", reprojection_freq=3)
    for seed in range(6):
        if seed == change:
            lose_a_direction(model)
        loss = loss_of(model, seed)
        for question in asked:
            before = everything(model, optimizer)
            QUESTIONS[question](optimizer)
            assert_same(everything(model, optimizer), before, question)
        loss.backward()
        for question in asked:
            QUESTIONS[question](optimizer)
        optimizer.step()
        for question in asked:
            QUESTIONS[question](optimizer)
        optimizer.zero_grad()
    return everything(model, optimizer)


@settings(max_examples=5, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(
    mode=st.sampled_from(MODES),
    asked=st.lists(st.sampled_from(sorted(QUESTIONS)), min_size=1, max_size=3),
    change=st.integers(0, 6),
)
def test_no_question_changes_a_bit(mode, asked, change):
    assert_same(run(mode, asked, change), run(mode, [], change))


def test_asking_after_weights_were_loaded_does_not_settle_the_ranks():
    """The answer follows the weights; what training knows of its ranks, it learns at the next step."""
    model = network()
    optimizer = wrapped(model)
    train(model, optimizer, 2)
    lose_a_direction(model)
    before = everything(model, optimizer)
    assert set(optimizer.ranks().values()) == {2}
    assert set(optimizer.telemetry()["ranks"].values()) == {2}
    assert_same(everything(model, optimizer), before)


@pytest.mark.parametrize("mode", ["spectral", "balanced"])
def test_questions_from_another_thread_change_nothing(mode):
    ends = []
    for asking in (True, False):
        model = network()
        optimizer = wrapped(model, precondition=mode, reprojection="balanced", reprojection_freq=2)
        stop, errors, answers = threading.Event(), [], []

        def ask(optimizer=optimizer, stop=stop, errors=errors, answers=answers):
            try:
                while not stop.is_set():
                    answers.append([optimizer.ranks(), optimizer.telemetry()])
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=ask)
        if asking:
            thread.start()
        train(model, optimizer, 12)
        while asking and not (answers or errors):
            pass
        stop.set()
        if asking:
            thread.join()
        assert errors == []
        ends.append(everything(model, optimizer))
    assert_same(*ends)
