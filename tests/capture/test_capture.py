"""What the taps gather equals what a slow twin computes from x and g, in every way a forward pass can run."""

import pytest
import support
import torch
from peft import LoraConfig, get_peft_model
from tiny import HandWritten, llama, loss_of, tokens
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from twin import assert_near, assert_sums_agree, folded_sums, pairs_of, still, twin_sums, warm

from grit_optim import Site
from grit_optim.capture import gathered as capture

FP32_IDENTITY = 1e-5
BF16_IDENTITY = 0.02


def assert_identity(optimizer, relative, sites=14):
    """⟨A, ∇A⟩ = ⟨B, ∇B⟩ = Σ h·δ, after a backward pass and before the step.

    Sums that cancel get the rounding of their terms.
    """
    reports = optimizer.check_capture()
    assert len(reports) == sites
    largest = max(abs(r.a_inner) for r in reports)
    for r in reports:
        assert r.status == "ok", r
        assert r.a_inner == pytest.approx(r.tap_inner, rel=relative, abs=relative * largest)
        assert r.b_inner == pytest.approx(r.tap_inner, rel=relative, abs=relative * largest)
    assert largest > 1e-6


def assert_twin(model, run, relative=1e-4, identity=FP32_IDENTITY, expected=None, sites=14):
    """One step's statistics over ``run()`` against the twin's, computed here unless ``expected`` is given."""
    expected = expected or twin_sums(pairs_of(model), run)
    optimizer = still(model)
    run()
    assert_identity(optimizer, identity, sites)
    optimizer.step()
    assert_sums_agree(optimizer, expected, relative, sites)
    return optimizer


# -------------------------------------------------------------------- ways to run

VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "bias": {"lora_bias": True},
    "dora": {"use_dora": True},
    "alpha": {"lora_alpha": 13},
    "mixed ranks": {"rank_pattern": {"q_proj": 2, "down_proj": 7}, "alpha_pattern": {"q_proj": 5}},
}


@pytest.mark.parametrize("lora", VARIANTS.values(), ids=VARIANTS.keys())
def test_variants_of_lora(lora):
    model = warm(llama(**lora))
    assert_twin(model, lambda: loss_of(model).backward())


def test_dropout():
    """The rows are those after dropout, which the pair really saw."""
    model = warm(llama(lora_dropout=0.3)).train()

    def run():
        torch.manual_seed(5)
        loss_of(model).backward()

    assert_twin(model, run)


def test_gradient_accumulation():
    model = warm(llama())
    assert_twin(model, lambda: [(loss_of(model, seed) / 3).backward() for seed in range(3)])


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "other"])
def test_activation_checkpointing(reentrant, accumulated):
    """Recomputation runs each forward hook twice; what arrives must be what the plain run gives."""
    model = warm(llama()).train()

    def run():
        for seed in range(accumulated):
            loss_of(model, seed, use_cache=False).backward()

    expected = twin_sums(pairs_of(model), run)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_twin(model, run, expected=expected)


def test_forward_passes_without_backward_leave_no_trace():
    model = warm(llama())
    expected = twin_sums(pairs_of(model), lambda: loss_of(model).backward())

    def run():
        model.eval()
        loss_of(model, 1)
        with torch.no_grad():
            loss_of(model, 2)
        loss_of(model).backward()
        with torch.inference_mode():
            loss_of(model, 3)
        model.train()
        loss_of(model, 4)

    assert_twin(model, run, expected=expected)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("twin_in_bf16", [True, False], ids=["same run", "fp32 run"])
def test_bf16_autocast(twin_in_bf16, seed):
    """Also where ⟨A, ∇A⟩ nearly cancels, so that bf16's rounding is more than two per cent of it.

    Without the queries: the first of each sequence sees one key, and whether rounding leaves its δ at zero,
    so that the token counts, differs between precisions.
    """
    model = warm(
        llama(seed=seed, target_modules=["k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    )

    def run(enabled=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = loss_of(model, seed)
        loss.backward()

    expected = twin_sums(pairs_of(model), lambda: run(twin_in_bf16))
    optimizer = assert_twin(model, run, 0.02 if twin_in_bf16 else 0.06, BF16_IDENTITY, expected, sites=12)
    assert optimizer.state_dict()["grit"]["sites"][next(iter(expected))]["activation"].dtype == torch.float32


def test_padding_and_unpredicted_tokens_count_for_nothing():
    """Sequences of 12, 9, 6 and 3 tokens predict 11 + 8 + 5 + 2; all behind them have δ = 0 at every site."""
    model = warm(llama())
    lengths = torch.tensor([12, 9, 6, 3])
    mask = (torch.arange(12) < lengths[:, None]).long()
    labels = tokens().masked_fill(mask == 0, -100)
    optimizer = assert_twin(
        model, lambda: model(input_ids=tokens(), attention_mask=mask, labels=labels).loss.backward()
    )
    assert max(rows for _, _, rows in folded_sums(optimizer).values()) == 26
    assert min(rows for _, _, rows in folded_sums(optimizer).values()) >= 22


class Twice(nn.Module):
    """Uses one pair twice in a forward pass."""

    def __init__(self):
        super().__init__()
        self.layer = HandWritten(6, 6)

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


def hand_written(model, optimizer_options=None):
    found = {n: m for n, m in model.named_modules() if isinstance(m, HandWritten)}
    sites = [Site.from_modules(name, m.down, m.up, m.scaling) for name, m in found.items()]
    pairs = {name: (m.down, m.up) for name, m in found.items()}
    return pairs, lambda: still(model, sites=sites, **(optimizer_options or {}))


@pytest.mark.parametrize("make", [HandWritten, Twice], ids=["once", "twice"])
def test_hand_written_sites(make):
    model = warm(make())
    pairs, build = hand_written(model)
    x = torch.randn(3, 7, 6)
    expected = twin_sums(pairs, lambda: model(x).square().mean().backward())
    optimizer = build()
    model(x).square().mean().backward()
    assert_identity(optimizer, FP32_IDENTITY, sites=1)
    optimizer.step()
    assert_sums_agree(optimizer, expected, sites=1)
    assert {rows for _, _, rows in folded_sums(optimizer).values()} == {21 if make is HandWritten else 42}


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.second = nn.Conv2d(6, 5, 3)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("shape", [(2, 3, 12, 10), (3, 12, 10)], ids=["batch", "one image"])
def test_convolutions(shape):
    model = warm(get_peft_model(Images(), LoraConfig(r=4, target_modules=["first", "second"])))
    image = torch.randn(shape)
    batch = image if image.dim() == 4 else image[None]
    expected = twin_sums(pairs_of(model), lambda: model(batch).square().mean().backward())
    assert_twin(model, lambda: model(image).square().mean().backward(), expected=expected, sites=2)


def test_gpt2_keeps_its_weights_transposed():
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=48, n_positions=32)
    lora = LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    model = warm(get_peft_model(GPT2LMHeadModel(config).eval(), lora))
    assert_twin(model, lambda: loss_of(model).backward(), sites=4)


class Quantizable(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.first, self.second = layer(), layer()

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def quantized(bits):
    bnb = pytest.importorskip("bitsandbytes")
    if bits == 4:
        kinds = {"quant_type": "nf4", "compress_statistics": True, "compute_dtype": torch.float32}
        model = Quantizable(lambda: bnb.nn.Linear4bit(64, 64, **kinds))
    else:
        model = Quantizable(lambda: bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False))
    setattr(model, f"is_loaded_in_{bits}bit", True)
    return get_peft_model(model.to("cpu"), LoraConfig(r=4, target_modules=["first", "second"]))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.filterwarnings("ignore:.*will be cast.*", "ignore:.*inputs will be.*")
def test_quantized_layers(bits):
    model = warm(quantized(bits))
    assert type(model.base_model.model.first).__module__ == "peft.tuners.lora.bnb"
    x = torch.randn(8, 64)
    assert_twin(model, lambda: model(x).square().mean().backward(), sites=2)


def test_of_two_adapters_the_active_one_is_seen():
    model = llama()
    model.add_adapter("other", LoraConfig(r=4, target_modules="all-linear"))
    model.set_adapter("other")
    warm(model)
    expected = twin_sums(pairs_of(model, "other"), lambda: loss_of(model).backward())
    optimizer = still(model)
    loss_of(model).backward()
    assert_identity(optimizer, FP32_IDENTITY)
    optimizer.step()
    assert_sums_agree(optimizer, expected)


@pytest.mark.parametrize("limit", [0, 1000, capture.PENDING_LIMIT])
@pytest.mark.parametrize("max_tokens", [None, 20, 3])
def test_the_identity_is_of_all_tokens_whatever_is_kept_of_them(monkeypatch, max_tokens, limit):
    monkeypatch.setattr(capture, "PENDING_LIMIT", limit)
    model = warm(llama())
    optimizer = still(model, max_tokens=max_tokens)
    for seed in range(3):
        loss_of(model, seed).backward()
    assert_identity(optimizer, FP32_IDENTITY)


@pytest.mark.parametrize("micro_batches", [3, 9])
def test_adding_up_early_gives_the_same(monkeypatch, micro_batches):
    model = warm(llama())

    def run():
        for seed in range(micro_batches):
            loss_of(model, seed).backward()

    expected = twin_sums(pairs_of(model), run)
    late, early = still(model), None
    run()
    assert support.waiting(late) == [14 * micro_batches]
    late.step()
    late.zero_grad()
    monkeypatch.setattr(capture, "PENDING_LIMIT", 1000)
    early = still(model)
    run()
    assert support.waiting(early)[0] < 14
    early.step()
    assert_sums_agree(late, expected)
    assert_sums_agree(early, expected)
    for name, (activation, gradient, _) in folded_sums(late).items():
        assert_near(folded_sums(early)[name][0], activation, 1e-6)
        assert_near(folded_sums(early)[name][1], gradient, 1e-6)
