"""What else users switch on in the Trainer, with GritOptimizer in it."""

import copy
import json

import pytest
import tiny
import torch
from packaging.version import Version

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from hf import (  # noqa: E402
    BEST,
    HALF,
    Agreement,
    Stop,
    assert_close,
    built,
    engaged,
    loss_on_data,
    restarted,
    run,
)
from peft import LoraConfig, get_peft_model  # noqa: E402

from grit_optim.integrations.callback import GritCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("error:.*(GRIT|Grit).*")

BY_LENGTH = (
    {"group_by_length": True}
    if Version(transformers.__version__) < Version("5")
    else {"train_sampling_strategy": "group_by_length"}
)
OPTIONS = {
    "group_by_length": BY_LENGTH,
    "neftune_noise_alpha": {"neftune_noise_alpha": 0.1},
    "label_smoothing_factor": {"label_smoothing_factor": 0.1},
}


@pytest.mark.parametrize("arguments", OPTIONS.values(), ids=OPTIONS.keys())
def test_options_that_change_data_or_loss(tmp_path, arguments):
    model, optimizer = built()
    before, agreement = loss_on_data(model), Agreement()
    run(
        tmp_path, model, (optimizer, None), callbacks=[agreement], gradient_accumulation_steps=2, **arguments
    ).train()
    assert engaged(optimizer) == (6, 7)
    agreement.assert_whole(6)
    assert loss_on_data(model) < before


def test_a_schedule_that_follows_the_loss_says_where_label_smoothing_hides_it(tmp_path):
    model, optimizer = built(adaptive_schedule=True)
    with pytest.warns(UserWarning, match=r"told no loss in 20 steps.*observe"):
        run(tmp_path, model, (optimizer, None), label_smoothing_factor=0.1, max_steps=20).train()


class TwoLayers(torch.nn.Module):
    """The least that the Trainer trains; a Llama takes seconds to compile."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(tiny.VOCABULARY, 16)
        self.inner = torch.nn.Linear(16, 16)
        self.head = torch.nn.Linear(16, tiny.VOCABULARY)

    def forward(self, input_ids, labels):
        logits = self.head(torch.relu(self.inner(self.embedding(input_ids))))
        return {
            "loss": torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()),
            "logits": logits,
        }


def two_layers():
    torch.manual_seed(0)
    return get_peft_model(TwoLayers(), LoraConfig(r=4, lora_alpha=4, target_modules=["inner", "head"]))


def test_torch_compile(tmp_path):
    """The Trainer compiles when training begins, after the optimizer is built: its taps are in the graph."""
    torch._dynamo.reset()
    plain, optimizer = built(two_layers())
    run(tmp_path, plain, (optimizer, None)).train()
    model, compiled = built(two_layers())
    agreement, compiling = Agreement(), {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    run(tmp_path, model, (compiled, None), callbacks=[agreement], **compiling).train()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert engaged(compiled) == (6, 2)
    agreement.assert_whole(6)
    assert_close(model, plain, rtol=1e-3, atol=1e-4)


def test_a_batch_that_does_not_fit_is_tried_smaller(tmp_path):
    """auto_find_batch_size: what the taps saw of a failed backward pass does no harm; nothing warns."""
    model, optimizer = built()

    def watch(module, args, output):
        def complain(_):  # by now the taps of the feed-forward half have fired
            if output.shape[0] > 2:
                raise RuntimeError("CUDA out of memory.")

        if output.requires_grad:
            output.register_hook(complain)

    model.get_base_model().model.layers[0].self_attn.o_proj.register_forward_hook(watch)
    agreement = Agreement()
    trainer = run(tmp_path, model, (optimizer, None), callbacks=[agreement], auto_find_batch_size=True)
    trainer.train()
    assert trainer._train_batch_size == 2
    assert engaged(optimizer) == (6, 7)
    assert {status for statuses in agreement.seen[1:] for status in statuses} == {"ok"}


# -------------------------------------------------------------------- checkpoints that are not whole


def in_use(model):
    """Per site, how many directions of A and B are not zero."""
    layers = {
        f"{name}.default": layer for name, layer in model.named_modules() if getattr(layer, "lora_A", None)
    }
    pairs = {
        name: (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        for name, layer in layers.items()
    }
    return {name: int(((a != 0).any(1) | (b != 0).any(0)).sum()) for name, (a, b) in pairs.items()}


def share(optimizer):
    report = optimizer.ranks()
    return report.parameters / report.parameters_before


def test_a_checkpoint_without_the_optimizer_starts_the_curvature_anew(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3, "save_only_model": True}
    first, interrupted = built()
    run(tmp_path, first, (interrupted, None), callbacks=[Stop(3)], **saving).train()
    second, fresh = built(restarted())
    trainer = run(tmp_path, second, (fresh, None), **saving)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6
    assert engaged(fresh) == (3, 7)
    assert loss_on_data(second) < loss_on_data(first)


def test_ranks_that_a_checkpoint_had_given_up_are_not_counted_again(tmp_path):
    """Without its state the optimizer sees in the weights what was given up; it cuts no live direction."""
    saving = {"save_strategy": "steps", "save_steps": 3, "save_only_model": True}
    first, interrupted = built(**HALF)
    run(tmp_path, first, (interrupted, None), callbacks=[Stop(3)], **saving).train()
    assert share(interrupted) <= 0.5
    second, fresh = built(restarted(), **HALF)
    run(tmp_path, second, (fresh, None), **saving).train(resume_from_checkpoint=True)
    assert engaged(fresh)[0] == 3
    assert fresh.ranks() == in_use(second) == in_use(first) == interrupted.ranks()


def test_the_best_model_has_its_own_ranks(tmp_path):
    """It was saved before the budget was met. ranks(), shrink_(), saves and more training keep its ranks."""
    model, optimizer = built(**{**HALF, "reprojection_freq": 4, "rank_adaptation_start_step": 4})
    trainer = run(
        tmp_path, model, (optimizer, None), callbacks=[GritCallback()], **{**BEST, "greater_is_better": True}
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert in_use(model) == optimizer.ranks() == dict.fromkeys(in_use(model), 4)
    told = json.loads((tmp_path / "grit_final_ranks.json").read_text())
    assert told["parameters_kept"] == told["parameters"]
    assert {
        entry["grit_mean_rank"] for entry in trainer.state.log_history[-3:] if "grit_mean_rank" in entry
    } != {4.0}
    assert optimizer.save_adapter(tmp_path / "adapter").parameters == told["parameters"]
    best = loss_on_data(model)
    optimizer.shrink_()
    assert loss_on_data(model) == pytest.approx(best, rel=1e-6)


def test_weights_loaded_in_the_middle_of_training_are_not_cut_by_the_ranks_of_others():
    """As when training goes on from the best model: no optimizer state, and no reprojection in between."""
    model, optimizer = built(**{**HALF, "reprojection_freq": 4})
    tiny.train(model, optimizer, 1)
    whole = copy.deepcopy(model.state_dict())
    tiny.train(model, optimizer, 4, first=1)
    assert sum(in_use(model).values()) < 28
    assert optimizer.ranks().predicted_loss > 0
    model.load_state_dict(whole)
    tiny.train(model, optimizer, 2, first=5)
    assert set(in_use(model).values()) == {4}
    assert share(optimizer) == 1
    assert optimizer.ranks().predicted_loss == 0
