"""LoRA that no tap sees: each kind is engaged, and lowers the loss. docs/trainers.md has a row for each."""

import copy
from dataclasses import replace

import pytest
import torch
from fused import fuse_all, fuse_each, fuse_mlp, fuse_qkv
from peft import AdaLoraConfig, LoraConfig, PeftModel, VeraConfig, get_peft_model
from tiny import adamw, grit, llama, loss_of, tokens, train, trained, weights
from torch import nn
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from grit_optim import GritOptimizer, Site

FUSED = {
    "each projection": (fuse_each, 14),
    "QKV": (fuse_qkv, 6),
    "SwiGLU MLP": (fuse_mlp, 6),
    "all of them": (fuse_all, 14),
}


def falls(step, steps=12):
    """Train on one batch; whether the loss falls by a tenth of a nat."""
    losses = [step() for _ in range(steps)]
    return losses[-1] < losses[0] - 0.1


def on_one_batch(model, optimizer, lr=None):
    def step():
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def engaged(optimizer):
    told = optimizer.telemetry()
    return told["engaged_sites"], told["sites_by_gradients"]


@pytest.mark.parametrize("kind", FUSED)
def test_the_doubles_compute_what_peft_does(kind):
    """Output and gradients."""
    plain, fused = llama(init_lora_weights=False), FUSED[kind][0](llama(init_lora_weights=False))
    losses = [loss_of(model) for model in (plain, fused)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for one, other in zip(trained(plain), trained(fused), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("mode", ["spectral", "steer", "inverse", "eigenbasis", "balanced"])
@pytest.mark.parametrize("kind", FUSED)
def test_fused_kernels(kind, mode):
    fuse, count = FUSED[kind]
    model = fuse(llama())
    optimizer = grit(model, lr=3e-2, precondition=mode, kfac_update_freq=1)
    assert falls(on_one_batch(model, optimizer))
    assert engaged(optimizer) == (14, count)


@pytest.mark.parametrize("fisher", ["block_diagonal", "diagonal", "ekfac"])
def test_fused_kernels_with_every_fisher(fisher):
    model = fuse_all(llama())
    optimizer = grit(model, lr=3e-2, fisher=fisher)
    assert falls(on_one_batch(model, optimizer))
    assert engaged(optimizer) == (14, 14)


def test_kernels_that_are_fused_after_construction():
    model = llama()
    optimizer = grit(model, lr=3e-2)
    fuse_all(model)
    assert falls(on_one_batch(model, optimizer))
    assert engaged(optimizer) == (14, 14)


def test_a_model_compiled_and_run_before_construction():
    model = llama()
    compiled = torch.compile(model, backend="eager")
    compiled(input_ids=tokens(), labels=tokens()).loss.backward()
    for p in trained(model):
        p.grad = None
    optimizer = grit(model, lr=3e-2)
    assert falls(on_one_batch(compiled, optimizer))
    assert engaged(optimizer)[0] == 14


def test_an_embeddings_adapter():
    model = llama(target_modules=["embed_tokens", "q_proj"])
    optimizer = grit(model, lr=3e-2)
    assert falls(on_one_batch(model, optimizer))
    assert engaged(optimizer) == (3, 1)


class Attention(nn.Module):
    """One nn.MultiheadAttention, and a readout."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.out = nn.Linear(16, 1)

    def forward(self, x):
        return self.out(self.attention(x, x, x)[0])


def test_multihead_attention():
    torch.manual_seed(0)
    model = get_peft_model(Attention(), LoraConfig(r=4, target_modules=["attention"]))
    optimizer = grit(model, lr=3e-2)
    x = torch.randn(8, 6, 16)
    wanted = x.flip(1).mean(-1, keepdim=True)

    def step():
        loss = nn.functional.mse_loss(model(x), wanted)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    losses = [step() for _ in range(20)]
    assert losses[-1] < 0.8 * losses[0]
    engaged_sites, by_gradients = engaged(optimizer)
    assert engaged_sites == optimizer.telemetry()["sites"] > 0
    assert by_gradients > 0


def test_adalora_with_its_mask():
    """Its ranks fall in training; rows that the mask has taken are left alone by their gradients."""
    torch.manual_seed(0)
    config = llama().base_model.model.config
    settings = AdaLoraConfig(
        target_modules=["q_proj", "v_proj"], init_r=4, target_r=2, tinit=2, tfinal=4, deltaT=1, total_step=20
    )
    model = get_peft_model(LlamaForCausalLM(config), settings)
    optimizer = grit(model, lr=3e-2)
    done = 0

    def step():
        nonlocal done
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(done)
        optimizer.zero_grad()
        done += 1
        return loss.item()

    assert falls(step, 20)
    assert engaged(optimizer) == (4, 4)
    kept = [int((e != 0).sum()) for n, e in model.named_parameters() if "lora_E" in n]
    assert sum(kept) < 16


EXPERTS = 4


def mixture():
    """One layer of four experts; both of their matrices are adapted, and the attention's queries."""
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        vocab_size=48,
    )
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    lora = LoraConfig(r=3, target_modules=["q_proj"], target_parameters=targets)
    return get_peft_model(MixtralForCausalLM(config), lora)


@pytest.mark.parametrize("mode", ["spectral", "steer", "inverse", "eigenbasis", "balanced"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_experts(mode):
    model = mixture()
    optimizer = grit(model, lr=3e-2, precondition=mode, kfac_update_freq=1)
    assert falls(on_one_batch(model, optimizer))
    assert engaged(optimizer) == (1 + 2 * EXPERTS, 2 * EXPERTS)


@pytest.mark.parametrize("fisher", ["block_diagonal", "diagonal", "ekfac"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_experts_with_every_fisher(fisher):
    model = mixture()
    optimizer = grit(model, lr=3e-2, fisher=fisher)
    assert falls(on_one_batch(model, optimizer))
    assert engaged(optimizer) == (1 + 2 * EXPERTS, 2 * EXPERTS)


@pytest.mark.parametrize("mode", ["spectral", "steer", "inverse", "eigenbasis", "balanced"])
@pytest.mark.parametrize("base", ["adamw", "schedule-free"])
def test_stacked_experts_move_as_each_does_alone(mode, base):
    """Parameters that hold all experts in PEFT's layout, against a pair of parameters for each."""
    generator = torch.Generator().manual_seed(0)
    r, d_in, d_out = 3, 7, 5
    a = torch.randn(EXPERTS, r, d_in, generator=generator)
    b = torch.randn(EXPERTS, d_out, r, generator=generator)

    def run(parameters, sites, loss_of_parts):
        holder = nn.Module()
        if base == "adamw":
            inner = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
        else:
            inner = pytest.importorskip("schedulefree").AdamWScheduleFree(parameters, lr=1e-2)
            inner.train()
        optimizer = GritOptimizer(
            inner, holder, sites=sites, precondition=mode, kfac_min_samples=1, kfac_update_freq=1
        )
        for step in range(4):
            x = torch.randn(EXPERTS, 6, d_in, generator=torch.Generator().manual_seed(step))
            y = torch.randn(EXPERTS, 6, d_out, generator=torch.Generator().manual_seed(99 + step))
            loss_of_parts(x, y).backward()
            optimizer.step()
            optimizer.zero_grad()

    def loss(x, y, of_a, of_b):
        out = (x @ of_a.mT @ of_b.mT - y).square().mean((1, 2))
        return out[1:].sum()  # the first expert sees no token

    whole_a = nn.Parameter(a.reshape(EXPERTS * r, d_in).clone())
    whole_b = nn.Parameter(b.permute(1, 2, 0).reshape(d_out, r * EXPERTS).clone())
    whole = Site.from_parameters("all", whole_a, whole_b)
    run(
        [whole_a, whole_b],
        [replace(whole, name=f"all.{e}", experts=EXPERTS, expert=e) for e in range(EXPERTS)],
        lambda x, y: loss(
            x, y, whole_a.view(EXPERTS, r, d_in), whole_b.view(d_out, r, EXPERTS).permute(2, 0, 1)
        ),
    )
    alone_a, alone_b = ([nn.Parameter(p.clone()) for p in stack] for stack in (a, b))
    run(
        [*alone_a, *alone_b],
        [Site.from_parameters(f"one.{e}", alone_a[e], alone_b[e]) for e in range(EXPERTS)],
        lambda x, y: loss(x, y, torch.stack(list(alone_a)), torch.stack(list(alone_b))),
    )
    for e in range(1, EXPERTS):
        torch.testing.assert_close(whole_a.view(EXPERTS, r, d_in)[e], alone_a[e], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(whole_b[:, e::EXPERTS], alone_b[e], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_experts_resume_exactly():
    model = mixture()
    optimizer = grit(model)
    train(model, optimizer, 4)
    kept, saved = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 3, 4)
    other = mixture()
    other.load_state_dict(kept)
    again = grit(other)
    again.load_state_dict(saved)
    train(other, again, 3, 4)
    assert all(torch.equal(w, weights(other)[n]) for n, w in weights(model).items())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_experts_are_saved_whole_beside_pairs_that_are_cut(tmp_path):
    model = mixture()
    with pytest.warns(UserWarning, match="leaves 8 adapter"):
        optimizer = grit(
            model, reprojection="balanced", reprojection_freq=2, rank_budget=0.4, min_lora_rank=1
        )
    train(model, optimizer, 6)
    assert list(optimizer.ranks().values()) == [1]
    optimizer.save_adapter(tmp_path)
    fresh = PeftModel.from_pretrained(mixture().unload(), tmp_path)
    torch.testing.assert_close(loss_of(fresh), loss_of(model))


def test_pairs_without_modules():
    torch.manual_seed(0)
    frozen, a, b = torch.randn(5, 6), nn.Parameter(torch.randn(3, 6) / 6), nn.Parameter(torch.zeros(5, 3))
    model = nn.Module()
    model.a, model.b = a, b
    base = torch.optim.AdamW([a, b], lr=3e-2)
    optimizer = GritOptimizer(
        base, model, sites=[Site.from_parameters("pair", a, b, 2.0)], kfac_min_samples=1
    )
    x, y = torch.randn(64, 6), torch.randn(64, 5)

    def step():
        loss = (x @ (frozen + 2.0 * b @ a).T - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    losses = [step() for _ in range(20)]
    assert losses[-1] < 0.8 * losses[0]
    assert engaged(optimizer) == (1, 1)


@pytest.mark.parametrize(
    ("a", "b", "error", "said"),
    [
        (torch.zeros(3, 6), torch.zeros(5, 4), ValueError, r"A must be \[r, d_in\] and B \[d_out, r\]"),
        (nn.Linear(6, 3), torch.zeros(5, 3), TypeError, "`a` is a Linear.*from_modules"),
    ],
)
def test_what_is_no_pair_is_refused(a, b, error, said):
    with pytest.raises(error, match=said):
        Site.from_parameters("pair", a, b)


def test_shared_matrices_are_refused_with_the_reason():
    """VeRA trains two vectors for each layer; its A and B are frozen and common to all."""
    config = llama().base_model.model.config
    model = get_peft_model(LlamaForCausalLM(config), VeraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    with pytest.raises(ValueError, match=r"VeRA.*shared by all layers"):
        GritOptimizer(adamw(model), model)


# ---------------------------------------------------------------- what else holds


def test_taps_only_leaves_them_to_the_base():
    model = llama(target_modules=["embed_tokens", "q_proj"])
    with pytest.warns(UserWarning, match="leaves 1 adapter.*looked up"):
        optimizer = grit(model, capture="taps")
    assert optimizer.telemetry()["sites"] == 2


def test_pairs_that_cannot_move_are_left_to_the_base_where_others_do():
    model = llama(target_modules=["embed_tokens", "q_proj"])
    with pytest.warns(UserWarning, match="leaves 1 adapter.*looked up"):
        optimizer = grit(
            model, reprojection="balanced", rank_budget=0.5, min_lora_rank=1, reprojection_freq=2
        )
    train(model, optimizer, 6)
    assert sum(optimizer.ranks().values()) == 4


def test_a_plan_names_the_pairs_that_cannot_lose_directions():
    model = llama(target_modules=["embed_tokens", "q_proj"])
    optimizer = grit(model, min_lora_rank=0)
    train(model, optimizer, 6)
    (name,) = [name for name in optimizer.ranks() if "embed" in name]
    with pytest.raises(ValueError, match=r"1 site\(s\) cannot be given up.*embed_tokens"):
        optimizer.reduce_ranks_({name: 1})
    optimizer.reduce_ranks_({name: 4})
    assert sum(optimizer.reduce_ranks_(0.5).values()) == 4 + 4  # the embedding keeps its four


@pytest.mark.parametrize(
    "options", [{}, {"reprojection": "balanced", "reprojection_freq": 3, "rank_budget": 0.5}]
)
def test_a_budget_cut_and_export_under_fused_kernels(tmp_path, options):
    """Ranks are chosen, cut and saved as where taps see the tokens; the loss that this costs is not known."""
    model = fuse_all(llama())
    optimizer = grit(model, min_lora_rank=1, **options)
    train(model, optimizer, 12)
    if not options:
        report = optimizer.reduce_ranks_(0.5)
        assert report.predicted_loss is None
    assert 14 <= sum(optimizer.ranks().values()) <= 30
    before = loss_of(model).item()
    optimizer.shrink_()
    assert loss_of(model).item() == pytest.approx(before, rel=1e-4)
    train(model, optimizer, 3)
    optimizer.save_adapter(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
