"""Statistics are exchanged with the processes that the model is wrapped for, and with no others."""

import copy
import pickle

import launch
import pairs
import pytest
import support
import torch
import whose_processes

from grit_optim.integrations.factory import for_trainer

PROCESSES = 2


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Every scenario's end in each of two processes."""
    folder = tmp_path_factory.mktemp("whose")
    return launch.ends(launch.start(whose_processes.__file__, PROCESSES, folder), folder)


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(launch.tensors(left), launch.tensors(right), strict=True))


@pytest.mark.parametrize("name", ["separate", "said"])
def test_separate_models_are_trained_as_each_is_alone(found, name):
    """Two processes with models, data and numbers of steps of their own."""
    for rank in range(PROCESSES):
        alone = whose_processes.separate(rank, 1)
        assert alone["steps"] == 3 + 2 * rank
        assert equal(found[rank][name]["weights"], alone["weights"])


def test_a_bare_model_is_told_of_once(found):
    for end in found:
        (message,) = end["separate"]["warnings"]
        assert "is wrapped in neither DDP nor FSDP2" in message
        assert "process_group=torch.distributed.group.WORLD" in message
        assert end["said"]["warnings"] == end["before"]["warnings"] == end["after"]["warnings"] == []


def test_pairs_that_fsdp2_leaves_alone_need_to_be_told_of(found):
    """All of them: without it each process knows its own tokens alone."""
    for end in found:
        (message,) = end["ignored"]["warnings"]
        assert "FSDP2 leaves all of its pairs alone (ignored_params)" in message
        assert end["ignored, said"]["warnings"] == []
    first, second = (end["ignored, said"] for end in found)
    assert equal([first["weights"], first["state"]], [second["weights"], second["state"]])
    assert not equal(found[0]["ignored"]["state"]["grit"], found[1]["ignored"]["state"]["grit"])


@pytest.mark.parametrize("name", ["before", "after", "by hand"])
def test_the_processes_of_ddp_are_found_whenever_it_comes(found, name):
    first, second = (end[name] for end in found)
    assert equal([first["weights"], first["state"]], [second["weights"], second["state"]])
    assert equal(first["weights"], found[0]["before"]["weights"])


def test_ddp_that_comes_after_steps_without_it_is_found(found):
    first, second = (end["alone first"] for end in found)
    assert first["steps"] == 5
    assert equal([first["weights"], first["state"]], [second["weights"], second["state"]])


def test_none_exchanges_nothing_under_ddp_either(found):
    first, second = (end["DDP, None"] for end in found)
    assert not equal(first["weights"], second["weights"])


def test_uneven_inputs_under_join(found):
    """The processes end equal, moments included, and go on so."""
    first, second = (end["Join"] for end in found)
    assert first["steps"] == second["steps"] == 5 + 2
    assert equal([first["weights"], first["state"]], [second["weights"], second["state"]])


def test_a_join_that_does_not_know_the_optimizer_ends_as_adamws(found):
    for end in found:
        (message,) = end["Join without"]["warnings"]
        assert "Write Join([model, optimizer])" in message
        assert end["Join without"]["steps"] == 0
        assert equal(end["Join without"]["weights"], end["Join, AdamW"]["weights"])


def test_a_process_that_died_gives_torchs_error(found):
    error = found[0]["died"]["error"]
    assert "peer" in error or "onnection" in error
    assert "grit" not in error.lower()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("world", ValueError, "process_group='world' is unknown: pass a torch.distributed group, None"),
        (3, TypeError, "must be a torch.distributed process group, None or 'auto', got int"),
        (torch.distributed.GroupMember.NON_GROUP_MEMBER, ValueError, "not a member"),
    ],
)
def test_what_is_no_group_is_refused(given, error, message):
    model = pairs.network()
    with pytest.raises(error, match=message.replace(".", r"\.")):
        pairs.wrapped(model, process_group=given)
    assert not any(m._forward_hooks for m in model.modules())


def test_copies_and_the_factory_keep_what_was_said():
    model = pairs.network()
    optimizer = for_trainer(model, lr=1e-2, process_group=None)
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert not support.parts(copied).processes.asked
