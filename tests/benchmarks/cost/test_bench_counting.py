"""What is counted agrees with formulas, and with slow twins, on small shapes."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.core.files import BenchmarkError
from benchmarks.cost.count import counted_step, meta_model, nf4_bytes
from benchmarks.cost.counting import Counter, LiveBytes, list_launches, stored_bytes
from benchmarks.cost.shapes import Workload
from benchmarks.cost.stages import PASSES
from benchmarks.cost.tables import count_table, own_stages, sizes_table
from grit_optim.capture import gathered

SMALL = Workload("tiny", rank=4, batch_size=2, length=24, accumulation=3, device="meta")
# tiny: hidden 64, 4 heads of 16 with 2 for keys and values, intermediate 128, vocabulary 256, 2 layers
WIDTHS = [
    (64, 64),
    (64, 32),
    (64, 32),
    (64, 64),
    (64, 128),
    (64, 128),
    (128, 64),
]  # d_in, d_out of q, k, v, o, gate, up, down


@pytest.fixture(scope="module")
def counted():
    return counted_step("grit", SMALL)


@pytest.fixture(scope="module")
def plain():
    return counted_step("adamw", SMALL)


# -------------------------------------------------------------------- single operations


def cost_of(work):
    with Counter("cpu") as counter:
        work()
    return counter.total()


X = torch.ones(6, 4)
ROW = torch.ones(4)


@pytest.mark.parametrize(
    ("work", "read", "written", "products", "launches"),
    [
        (lambda: X + X, 2 * 96, 96, 0, 1),
        (lambda: X + ROW, 96 + 16, 96, 0, 1),
        (lambda: X + ROW.expand(6, 4), 96 + 16, 96, 0, 1),
        (lambda: X.clone().mul_(2), 2 * 96, 2 * 96, 0, 2),
        (lambda: torch.empty(6, 4).copy_(X), 96, 96, 0, 1),
        (lambda: X.view(-1)[2:5], 0, 0, 0, 0),
        (lambda: X.half(), 96, 48, 0, 1),
        (lambda: X @ X.t(), 2 * 96, 4 * 36, 2 * 6 * 4 * 6, 1),
        (lambda: torch.dot(ROW, ROW), 32, 4, 8, 1),
        (lambda: X[torch.tensor([1, 3])], 2 * 16 + 16, 2 * 16, 0, 1),
        (lambda: torch.zeros(3, 4).index_add_(0, torch.tensor([1]), X[:1]), 16 + 16 + 8, 48 + 16, 0, 2),
        (lambda: torch.stack([ROW] * 130), 130 * 16, 130 * 16, 0, 2),
        (lambda: torch._foreach_add([X, X], 1.0), 2 * 96, 2 * 96, 0, 1),
    ],
    ids=[
        "add", "broadcast", "expanded", "in place", "copy", "view", "cast", "product", "dot", "index",
        "index_add", "stack",
        "list",
    ],
)  # fmt: skip
def test_one_operation(work, read, written, products, launches):
    cost = cost_of(work)
    assert (cost.read, cost.written, cost.flops, cost.launches) == (read, written, products, launches)


def test_an_expanded_tensor_is_stored_once():
    assert stored_bytes(torch.ones(3, 1).expand(3, 5)) == 12
    assert stored_bytes(torch.ones(0, 5)) == 0


def launches_by_the_book(sizes, depth):
    """CUDA's multi_tensor_apply, written as it is there: a loop over tensors and their chunks."""
    full = [110, 64, 48, 36, 30][depth - 1]
    launches = tensors = blocks = 0
    for size in sizes:
        if size == 0:
            continue
        tensors += 1
        chunks = (size + 65535) // 65536
        for chunk in range(chunks):
            blocks += 1
            last = chunk == chunks - 1
            if (tensors == full and last) or blocks == 320:
                launches, blocks, tensors = launches + 1, 0, 0 if last else 1
    return launches + (1 if blocks else 0)


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    "sizes",
    [[], [1], [0, 5], [65536] * 320, [65536] * 321, [10] * 110, [10] * 111, [16 * 4096] * 448,
    [16 * 14336, 16 * 1024] * 60,
     [65536 * 700], [65537] * 200],
    ids=lambda sizes: f"{len(sizes)}x{sizes[0] if sizes else 0}",
)  # fmt: skip
def test_kernels_of_an_operation_on_lists(sizes, depth):
    assert list_launches(sizes, depth) == launches_by_the_book(sizes, depth)


def test_live_bytes_rise_and_fall():
    with LiveBytes("cpu") as live:
        one = torch.ones(1000)
        view = one[:10]
        two = one + 1
        assert live.now == live.peak == 8000
        del one
        assert live.now == 8000  # the view holds it
        del view, two
        assert (live.now, live.peak) == (0, 8000)
        live.reset()
        three = torch.ones(10)
    assert (live.now, live.peak) == (40, 40)
    del three
    assert live.now == 0


# -------------------------------------------------------------------- a whole step


def frozen_products():
    """Forward, recomputed, and backward to the input, in two layers; the head once each way."""
    tokens = SMALL.tokens
    per_layer = sum(2 * a * b * tokens for a, b in WIDTHS)
    return SMALL.accumulation * (3 * 2 * per_layer + 2 * 2 * 64 * 256 * tokens)


def adapter_products():
    """Products of A and B and of their weights' gradients; nobody needs the layer's last product again."""
    pairs = sum(2 * (a + b) * SMALL.rank * SMALL.tokens for a, b in WIDTHS)
    last = 2 * WIDTHS[-1][1] * SMALL.rank * SMALL.tokens
    return SMALL.accumulation * 2 * (4 * pairs - last)


def attention_products():
    """Flash attention (torch.utils.flop_counter): two products forward, twice; backward five."""
    one = 2 * SMALL.batch_size * 4 * SMALL.length**2 * 16
    return SMALL.accumulation * 2 * one * (2 + 2 + 5)


def test_products_of_the_passes(plain):
    costs, _, _ = plain
    found = sum(costs[name].flops for name in PASSES)
    # To a thousandth: some versions of transformers make the rotary angles by a product, too.
    assert found == pytest.approx(frozen_products() + adapter_products() + attention_products(), rel=1e-3)


def newton_steps(smallest):
    count = 0
    while 1 - smallest > 1e-7:
        smallest, count = smallest * (3 - smallest) ** 2 / 4, count + 1
    return count


def test_products_of_the_stages(counted):
    """Roots of order 4 and 2 by Newton-Schulz, three r×r products an iteration; four of width r a matrix."""
    costs, _, _ = counted
    r, rows, passes, sites = (
        SMALL.rank,
        SMALL.tokens,
        SMALL.accumulation,
        14,
    )  # 24·2 tokens are below 1,024 a step
    widths = [width for pair in WIDTHS for width in pair] * 2
    smallest = 0.3 / (r * 1.3)
    fourth_root = newton_steps(smallest) + newton_steps(smallest**0.5)
    square_root = newton_steps(0.01 / (r * 1.01))
    assert "capture" not in costs  # with few tokens all of it waits for the step
    assert costs["fold"].flops == passes * sites * 2 * 2 * r * r * rows
    assert costs["refresh"].flops == 2 * sites * fourth_root * 3 * 2 * r**3
    assert (
        costs["precondition"].flops
        == sum(4 * 2 * r * r * width for width in widths) + 2 * sites * square_root * 6 * r**3
    )
    assert costs["base"].flops == 0


def test_adamw_moves_what_its_formula_says(plain):
    """Seven operations on lists: in reads and writes of the parameters' size."""
    trained = sum(SMALL.rank * (a + b) for a, b in WIDTHS) * 2 * 4  # bytes
    costs, _, operations = plain
    assert operations["base"]["_foreach_lerp_"] == operations["base"]["_foreach_addcdiv_"] == 1
    assert costs["base"].bytes == pytest.approx((12 + 7) * trained, rel=0.06)


def test_grit_changes_neither_the_passes_nor_the_base(counted, plain):
    for stage in (*PASSES, "base"):
        assert counted[0][stage] == plain[0][stage], stage
    assert set(plain[0]) == {*PASSES, "base"}
    assert set(counted[0]) == {*PASSES, "base", "fold", "refresh", "precondition"}


@pytest.mark.parametrize("layers", [2, 5])
def test_many_tokens_are_added_up_on_the_way_for_many_sites_at_once(counted, monkeypatch, layers):
    """Nothing is counted twice, and kernels follow the numbers that wait, not the sites."""
    numbers = 2 * SMALL.tokens * SMALL.rank  # of h and δ, for one site and pass
    sites = 7 * layers
    monkeypatch.setattr(gathered, "PENDING_LIMIT", (sites - 1) * numbers)  # as many as one pass has
    costs, _, _ = counted_step("grit", replace(SMALL, layers=layers))
    assert costs["capture"].flops == counted[0]["fold"].flops * layers / 2
    assert costs["fold"].flops == 0
    assert costs["capture"].launches == pytest.approx(SMALL.accumulation * 23, abs=2 * SMALL.accumulation)


def test_kernels_of_the_step_do_not_grow_with_the_layers(counted):
    costs, _, _ = counted_step("grit", replace(SMALL, layers=5))
    for stage in ("fold", "refresh", "precondition"):
        assert costs[stage].launches <= 1.05 * counted[0][stage].launches
    assert "capture" not in costs


@pytest.mark.parametrize("checkpointing", [True, False])
def test_what_the_taps_keep_from_forward_to_backward(checkpointing):
    """h in bf16, a row per token, where checkpointing drops it; else B's gradient needs it in any case."""
    workload = replace(SMALL, accumulation=1, checkpointing=checkpointing)
    plain, mine = (counted_step(name, workload)[1] for name in ("adamw", "grit"))
    kept = mine.after_forward - plain.after_forward - (mine.at_rest - plain.at_rest)
    assert kept == (14 * workload.tokens * workload.rank * 2 if checkpointing else 0)


def test_what_nf4_adds_follows_from_the_weights():
    weights = 2 * sum(a * b for a, b in WIDTHS)
    found = nf4_bytes(meta_model(SMALL), SMALL)
    assert found["weights"] == weights
    assert found["uses"] == 9
    assert found["written"] == 9 * 2 * weights
    assert 9 * weights / 2 < found["read"] < 1.05 * 9 * weights / 2


def test_an_optimizer_that_reads_values_is_named():
    with pytest.raises(BenchmarkError, match="grit-paper reads values from the device in its step"):
        counted_step("grit-paper", replace(SMALL, accumulation=1))


# -------------------------------------------------------------------- the command


def test_the_command_writes_what_its_table_says(tmp_path, capsys):
    size = ["--length", "24", "--rank", "4", "--accumulation", "1"]
    assert main(["count", "--model", "tiny", *size, "--out", str(tmp_path)]) == 0
    assert main(["count", "--model", "tiny", *size, "--optimizer", "grit-steer", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    results = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("count-*.json"))]
    assert [result["optimizer"] for result in results] == ["grit-steer", "grit"]
    for result in results:
        assert count_table(result) in printed
        assert result["parameters"]["sites"] == 14
        own = own_stages(result)
        assert set(own) == {"fold", "refresh", "precondition"}
        assert sum(cost["launches"] for cost in own.values()) > 100
        for cost in own.values():
            assert cost["device_seconds"] >= 0.999 * (cost["read"] + cost["written"]) / 3.35e12
    assert main(["report", str(tmp_path)]) == 0
    assert sizes_table(results) in (tmp_path / "table.md").read_text()
