"""What for_trainer refuses is said of for_trainer, and of the keyword that is wrong."""

import functools

import pytest
import tiny
import torch

from grit_optim import for_trainer

CALLS = {"on a model": for_trainer, "by the trainer": for_trainer()}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_missing_rate_and_unknown_keywords_are_for_trainers_own_errors(call):
    model = tiny.llama(layers=1)
    with pytest.raises(TypeError, match=r"^for_trainer\(\) needs lr=, the learning rate: .*lr=2e-4"):
        call(model, precondition="steer")
    for wrong, near in (("kfac_dampin", "kfac_damping"), ("weight_decai", "weight_decay")):
        said = rf"^for_trainer\(\) got '{wrong}', which .* of AdamW; did you mean '{near}'\?"
        with pytest.raises(TypeError, match=said):
            call(model, lr=1e-3, **{wrong: 0.1})
    assert not any(module._forward_hooks for module in model.modules())


def test_a_base_says_what_it_knows_or_is_asked():
    model = tiny.llama(layers=1)
    quiet = functools.partial(torch.optim.SGD, momentum=0.9)
    for_trainer(model, lr=1e-3, base=quiet, dampening=0.1).close()
    with pytest.raises(TypeError, match=r"got 'betas', which is neither .* nor a keyword of partial"):
        for_trainer(model, lr=1e-3, base=quiet, betas=(0.9, 0.99))

    def any_keywords(groups, **settings):
        assert settings == {"lr": 1e-3, "colour": "blue"}
        return torch.optim.SGD(groups, lr=settings["lr"])

    for_trainer(model, lr=1e-3, base=any_keywords, colour="blue").close()
