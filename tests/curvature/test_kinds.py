"""The factors of text tokens and of pictures' tokens: dense truth in float64, and how they are combined."""

import json
import warnings
from copy import deepcopy

import pytest
import tiny
import torch
import vlm
from hf import assert_same
from support import sites

from grit_optim import GritOptimizer, Site
from grit_optim.capture import processes
from grit_optim.capture.sums import Sums
from grit_optim.options.declared import TOKEN_KINDS

WATCHED = "base_model.model.model.language_model.layers.0.self_attn.v_proj"
ABSOLUTE = {"damping": "absolute", "kfac_damping": 1e-3, "kfac_min_samples": 2, "max_tokens": None}


def grit(model, weights="equal", lr=1e-3, **options):
    return GritOptimizer(tiny.adamw(model, lr), model, modality_weights=weights, **{**ABSOLUTE, **options})


class Dense:
    """What single tokens bring to one layer's pair, in float64: the slow, obviously right twin of the taps.

    It reads the layer's input x and the gradient g of its output: h = A x, δ = s Bᵀ g.
    """

    def __init__(self, model, name=WATCHED):
        self.layer, self.rows = model.get_submodule(name), []
        self.layer.register_forward_hook(self.keep)

    def keep(self, module, args, output):
        if output.requires_grad:
            output.retain_grad()
            self.rows.append((args[0].detach(), output))

    def second_moments(self, kinds):
        """For each kind E[h hᵀ], E[δ δᵀ] and the number of tokens, over all passes so far."""
        a, b = self.layer.lora_A["default"].weight, self.layer.lora_B["default"].weight
        h = torch.cat([x.flatten(0, 1) @ a.T for x, _ in self.rows]).detach()
        delta = torch.cat([out.grad.flatten(0, 1) @ b for _, out in self.rows]).detach()
        of = torch.cat([k.flatten() for k in kinds])
        found = {}
        for k, kind in enumerate(TOKEN_KINDS):
            mine = (of == k) & (delta != 0).any(1)
            n = max(int(mine.sum()), 1)
            found[kind] = (h[mine].T @ h[mine] / n, delta[mine].T @ delta[mine] / n, int(mine.sum()))
        return found


def kinds_of(batch):
    return (batch["input_ids"] == vlm.IMAGE).long()


def position(optimizer, name=WATCHED):
    return next(i for i, site in enumerate(optimizer.curvature[0].bucket.sites) if name in site.name)


def close(ours, truth):
    torch.testing.assert_close(ours.double(), truth.double(), rtol=2e-4, atol=1e-9)


def packed(seed):
    """Two sequences in one row, told apart by their positions alone."""
    rows = vlm.batch(seed=seed, pictures=(1, 1))
    positions = torch.arange(rows["input_ids"].shape[1]).repeat(2)[None]
    flat = {name: rows[name].reshape(1, -1) for name in ("input_ids", "attention_mask", "labels")}
    return {**flat, "pixel_values": rows["pixel_values"], "position_ids": positions}


BATCHES = {
    "several pictures": [vlm.batch(seed=1, pictures=(2, 1))],
    "accumulation": [vlm.batch(seed=s, pictures=p) for s, p in enumerate([(1, 2), (1, 1), (3, 1)])],
    "no picture": [vlm.batch(seed=1, pictures=(0, 0))],
    "no picture in one of two": [vlm.batch(seed=1, pictures=(0, 0)), vlm.batch(seed=2)],
    "packing": [packed(3)],
}


def gathered(batches, weights="equal", prepare=None, together=False):
    """The optimizer after one step on these micro-batches, and the dense truth of a model not prepared."""
    model = vlm.adapted().double()
    optimizer, dense = grit(model, weights), Dense(model) if prepare is None else None
    if prepare is not None:
        prepare(model)
    batches = [{k: v.double() if v.is_floating_point() else v for k, v in b.items()} for b in batches]
    losses = []
    for batch in batches:
        losses.append(model(**batch).loss)
        if not together:
            losses[-1].backward()
    if together:
        sum(losses).backward()
    truth = dense and dense.second_moments([kinds_of(batch) for batch in batches])
    optimizer.step()
    return optimizer, truth


def assert_true(optimizer, truth):
    place, curvature = position(optimizer), optimizer.curvature[0]
    total = sum(n for *_, n in truth.values())
    for k, kind in enumerate(TOKEN_KINDS):
        activation, gradient, count = truth[kind]
        ours = curvature.kinds.of_kind(k)
        assert float(curvature.kinds.share[place, k]) == pytest.approx(count / total)
        close(ours[0][place], activation)
        close(ours[1][place], gradient)


@pytest.mark.parametrize("case", BATCHES)
def test_each_kinds_factors_are_the_dense_ones(case):
    assert_true(*gathered(BATCHES[case]))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("together", [False, True], ids=["one by one", "both forward, then both backward"])
def test_activations_that_are_computed_again_keep_their_passes_kinds(reentrant, together):
    """Recomputed in the backward pass, when the latest forward pass may have been of another batch."""

    def checkpoint(model):
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()

    batches = [vlm.batch(seed=1, pictures=(1, 2)), vlm.batch(seed=2, pictures=(2, 1))]
    optimizer, _ = gathered(batches, prepare=checkpoint, together=together)
    plain, truth = gathered(batches)
    assert_true(plain, truth)
    for ours, theirs in zip(
        (optimizer.curvature[0].kinds.activation, optimizer.curvature[0].kinds.gradient),
        (plain.curvature[0].kinds.activation, plain.curvature[0].kinds.gradient),
        strict=True,
    ):
        close(ours, theirs)


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ("equal", {"text": 0.5, "vision": 0.5}),
        ({"text": 3, "vision": 1}, {"text": 0.75, "vision": 0.25}),
        ({"text": 1, "vision": 0}, {"text": 1.0, "vision": 0.0}),
    ],
)
def test_the_factors_in_force_are_the_kinds_by_their_shares(weights, shares):
    optimizer, truth = gathered(BATCHES["several pictures"], weights)
    factors, place = optimizer.curvature[0].factors, position(optimizer)
    close(factors.activation[place], sum(shares[kind] * truth[kind][0] for kind in shares))
    close(factors.gradient[place], sum(shares[kind] * truth[kind][1] for kind in shares))


def test_without_a_picture_all_the_weight_is_the_texts():
    optimizer, truth = gathered(BATCHES["no picture"])
    close(optimizer.curvature[0].factors.activation[position(optimizer)], truth["text"][0])


def train(model, optimizer, steps, first=0, pictures=((1, 2), (1, 1), (0, 0))):
    for seed in range(first, first + steps):
        model(**vlm.batch(seed=seed, pictures=pictures[seed % len(pictures)])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_the_kinds_together_are_the_factors_as_they_come():
    """Over several steps, some without pictures: Σ_k C^k is Σ of an optimizer that tells no kinds apart."""
    runs = []
    for weights in ("equal", None):
        model = vlm.adapted()
        optimizer = grit(model, weights, lr=0.0)
        train(model, optimizer, 4)
        runs.append(optimizer.curvature[0])
    close(runs[0].kinds.activation.sum(1), runs[1].factors.activation)
    close(runs[0].kinds.gradient.sum(1), runs[1].factors.gradient)
    assert torch.equal(runs[0].factors.activation_samples, runs[1].factors.activation_samples)


def test_a_step_without_pictures_leaves_their_factors_as_they_were():
    model = vlm.adapted()
    optimizer = grit(model)
    train(model, optimizer, 2)
    before = [t.clone() for t in optimizer.curvature[0].kinds.of_kind(1)]
    train(model, optimizer, 1, pictures=((0, 0),))
    for now, then in zip(optimizer.curvature[0].kinds.of_kind(1), before, strict=True):
        close(now, then)


def test_pairs_that_see_one_kind_alone_are_as_without_weights():
    """The vision encoder and the projector, whatever the weights, and bit by bit."""
    curvatures = []
    for weights in ({"text": 1, "vision": 0}, None):
        model = vlm.adapted()
        optimizer = grit(model, weights, lr=0.0)
        train(model, optimizer, 1)
        curvatures.append(optimizer.curvature[0])
    single = [i for i, site in enumerate(curvatures[0].bucket.sites) if site.modality != "text"]
    assert len(single) == 14
    close(curvatures[0].factors.activation[single], curvatures[1].factors.activation[single])
    other = [i for i, site in enumerate(curvatures[0].bucket.sites) if site.modality == "text"]
    difference = curvatures[0].factors.activation[other] - curvatures[1].factors.activation[other]
    assert float(difference.abs().max()) > 1e-3


# -------------------------------------------------------------------- told by the user


class Embedded(torch.nn.Module):
    """A model that is given embeddings, and no ids."""

    def __init__(self):
        super().__init__()
        self.inner = tiny.llama()

    def forward(self, inputs_embeds, labels):
        return self.inner(inputs_embeds=inputs_embeds, labels=labels)


def embedded_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(2, 9, generator=generator) < 0.6
    return torch.randn(2, 9, 16, generator=generator), tiny.tokens(seed, 2, 9), mask


def started(**options):
    model = Embedded()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    optimizer = grit(model, modality_of=lambda name: "vision" if "layers.1." in name else "text", **options)
    return model, optimizer


def test_a_mask_that_is_told_counts_for_the_coming_pass():
    model, optimizer = started()
    told = []
    for seed in range(2):
        embeds, labels, mask = embedded_batch(seed)
        optimizer.observe_tokens(mask)
        with torch.no_grad():
            model(embeds, labels)  # a pass without gradients takes nothing
        model(embeds, labels).loss.backward()
        told.append(mask)
    optimizer.step()
    place = position(optimizer, "layers.0.self_attn.v_proj")
    share = torch.cat(told)[:, :-1].float().mean()  # nothing comes of a row's last token
    assert float(optimizer.curvature[0].kinds.share[place, 1]) == pytest.approx(float(share))


def test_a_pass_of_which_nobody_says_the_kinds_is_told_once():
    model, optimizer = started()
    embeds, labels, _ = embedded_batch()
    with pytest.warns(UserWarning, match=r"cannot tell the tokens of .* apart.*observe_tokens"):
        model(embeds, labels).loss.backward()
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(embeds, labels).loss.backward()


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.zeros(2, 9), TypeError, "boolean tensor.*got a tensor of torch.float32"),
        ([True], TypeError, "got list"),
        (torch.zeros(9, dtype=torch.bool), ValueError, r"got the shape \[9\]"),
    ],
)
def test_what_is_no_mask_is_refused(mask, error, message):
    _, optimizer = started()
    with pytest.raises(error, match=message):
        optimizer.observe_tokens(mask)


def test_a_mask_of_another_shape_than_the_input_is_refused_and_forgotten():
    model, optimizer = started()
    embeds, labels, mask = embedded_batch()
    optimizer.observe_tokens(mask[:, :8])
    with pytest.raises(
        ValueError, match=r"a mask of shape \[2, 8\], and the model's input has \[2, 9\] tokens"
    ):
        model(inputs_embeds=embeds, labels=labels)
    optimizer.observe_tokens(mask)
    model(inputs_embeds=embeds, labels=labels).loss.backward()
    optimizer.step()


def test_a_mask_is_refused_where_nothing_is_weighed():
    optimizer = GritOptimizer(tiny.adamw(model := vlm.adapted()), model)
    with pytest.raises(ValueError, match="for modality_weights, which is not set"):
        optimizer.observe_tokens(torch.zeros(1, 2, dtype=torch.bool))


@pytest.mark.parametrize(
    ("make", "weights", "message"),
    [
        (tiny.llama, "equal", "found no vision part in PeftModel.*not multimodal"),
        (vlm.adapted, {"text": 1}, "gives no share to vision, which PeftModel has too"),
        (lambda: vlm.adapted("phi4-multimodal"), {"text": 1, "vision": 1}, "gives no share to audio"),
    ],
)
def test_weights_that_do_not_fit_the_model_are_refused_and_leave_no_hook(make, weights, message):
    model = make()
    with pytest.raises(ValueError, match=message):
        grit(model, weights)
    hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert not any("grit_optim" in str(hook) for hook in hooks)


# -------------------------------------------------------------------- the life of the factors


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path):
    options = {"reprojection": "balanced", "reprojection_freq": 2, "rank_budget": 0.5, "min_lora_rank": 1}
    model = vlm.adapted()
    optimizer = grit(model, **options)
    train(model, optimizer, 3)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    weights = tiny.weights(model)
    train(model, optimizer, 3, first=3)
    other = vlm.adapted()
    other.load_state_dict(weights, strict=False)
    resumed = grit(other, **options)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    train(other, resumed, 3, first=3)
    assert_same(other, model, matrices=56)


def test_checkpoints_with_and_without_kinds_load_into_each_other():
    model = vlm.adapted()
    for first, second in (("equal", None), (None, "equal")):
        optimizer = grit(model, first)
        train(model, optimizer, 2)
        state = deepcopy(optimizer.state_dict())
        optimizer.close()
        other = grit(model, second)
        other.load_state_dict(state)
        train(model, other, 2)
        assert other.telemetry(per_site=False)["engaged_sites"] == 28
        other.close()


def test_ranks_that_are_given_up_and_cut_take_the_kinds_along():
    model = vlm.adapted()
    optimizer = grit(model, min_lora_rank=1)
    train(model, optimizer, 3)
    optimizer.reduce_ranks_(0.5)
    kinds, factors = optimizer.curvature[0].kinds, optimizer.curvature[0].factors
    for ours, theirs in zip(kinds.combined(), (factors.activation, factors.gradient), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
    before = optimizer.ranks()
    optimizer.shrink_()
    assert optimizer.ranks() == before
    train(model, optimizer, 2)
    assert optimizer.telemetry(per_site=False)["engaged_sites"] == len(sites(optimizer))


def test_telemetry_tells_the_kinds_of_the_language_models_pairs(tmp_path):
    model = vlm.adapted()
    optimizer = grit(model)
    optimizer.log_to(tmp_path / "run.jsonl", every=1)
    train(model, optimizer, 2)
    told = optimizer.telemetry()["per_site"]
    text = told[f"{WATCHED}.default"]
    assert text["share_text"] + text["share_vision"] == pytest.approx(1, abs=1e-3)
    assert 1 <= text["effective_rank_a_vision"] <= 4
    picture = next(site for site in told.values() if site["modality"] == "vision")
    assert picture["share_vision"] is None
    optimizer.finish_logging()
    record = json.loads((tmp_path / "run.jsonl").read_text().splitlines()[2])
    assert "trace_g_text" in record["sites"]


def test_the_hooks_go_with_the_optimizer():
    model = vlm.adapted()
    before = [len(m._forward_pre_hooks) for m in model.modules()]
    optimizer = grit(model)
    assert [len(m._forward_pre_hooks) for m in model.modules()] != before
    optimizer.close()
    assert [len(m._forward_pre_hooks) for m in model.modules()] == before


def test_hand_written_pairs_of_known_modality_are_weighed_too():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = tiny.HandWritten(6, 6), tiny.HandWritten(6, 5)

        def forward(self, x):
            return self.two(self.one(x))

    model = Model()
    pairs = [
        Site.from_modules("one", model.one.down, model.one.up, 0.5, modality="vision"),
        Site.from_modules("two", model.two.down, model.two.up, 0.5, modality="text"),
    ]
    optimizer = GritOptimizer(tiny.adamw(model), model, sites=pairs, modality_weights="equal", **ABSOLUTE)
    optimizer.observe_tokens(torch.tensor([[True, False, False]]))
    model(torch.randn(1, 3, 6)).square().mean().backward()
    optimizer.step()
    assert optimizer.curvature[0].kinds.share[1].tolist() == pytest.approx([2 / 3, 1 / 3, 0])


def test_sums_by_kind_are_added_up_over_processes(monkeypatch):
    """Two processes that have seen the same: twice the tokens, and δ of the mean loss, half as large."""
    sums = [Sums.zeros(2, 3, torch.device("cpu"), kinds=3), Sums.zeros(1, 2, torch.device("cpu"), kinds=3)]
    for number, tensor in enumerate(t for s in sums for t in s.tensors()):
        tensor += number + 1
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda buffer, group: buffer.mul_(2))
    together = processes.add_up(sums, [1, 1, 1], [None] * 3, None).sums
    for ours, before in zip(together, sums, strict=True):
        assert ours.kinds is not None
        for name, factor in (("activation", 2), ("gradient", 0.5), ("rows", 2)):
            assert torch.equal(getattr(ours, name), factor * getattr(before, name))
            assert torch.equal(getattr(ours.kinds, name), factor * getattr(before.kinds, name))
        assert torch.equal(ours.tokens, 2 * before.tokens)


def test_copies_of_model_and_optimizer_are_told_and_leave_the_first_alone():
    """A copied model's hooks do nothing; its optimizer does not know the model, and is told the tokens."""
    model = vlm.adapted()
    optimizer = grit(model)
    train(model, optimizer, 1)
    other_model, other = deepcopy((model, optimizer))
    batch = vlm.batch(seed=5)
    other.observe_tokens(batch["input_ids"] == vlm.IMAGE)
    other_model(**batch).loss.backward()
    other.step()
    model(**batch).loss.backward()
    optimizer.step()
    assert torch.equal(other.curvature[0].kinds.share, optimizer.curvature[0].kinds.share)
    assert torch.equal(other.curvature[0].factors.gradient, optimizer.curvature[0].factors.gradient)
